"""How the state of training is divided among processes: the engines of `--sharding`, and where the frozen tower lives.

Every engine keeps float32 masters of what is trained and computes in bfloat16 with `--bf16`. The engines themselves are
Accelerate's (DDP, FSDP2) and DeepSpeed's (ZeRO); this module turns a flag into their configurations, keeps the frozen
vision tower out of what they shard, and puts the whole weights together for saving.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from transformers import PreTrainedModel
from transformers.integrations import set_hf_deepspeed_config, unset_hf_deepspeed_config

from metamorph.training.arguments.sharding import use_fsdp2
from metamorph.training.arguments.training import MetaMorphTrainingArguments
from metamorph.training.costs.memory import MicroBatch, estimate_memory


logger = logging.getLogger(__name__)

GPU_SHARE = 0.7
"""Share of a GPU that weights, gradients and optimizer may take before `auto` shards them; the rest is for
activations."""
TOWER = "model.vision_tower"
"""Path of the vision tower in a MetaMorph model."""


def prepare_engine(args: MetaMorphTrainingArguments, model: PreTrainedModel) -> str:
    """Settle what `auto` means, and what the engine must know of the model; to be called before the trainer is made.

    `auto` is FSDP2 if there are several GPUs and one cannot hold weights, gradients and optimizer, else DDP.

    Args:
        args: How the run learns; changed in place.
        model: A MetaMorph model after `apply_stage`.

    Returns:
        Name of the engine: `single`, a value of `--sharding`, or `deepspeed` where Transformers' own flag asks for it.
    """
    if args.deepspeed_plugin is not None:
        return args.sharding if args.sharding != "auto" else "deepspeed"
    if args.sharding == "auto" and not args.fsdp and args.world_size > 1 and args.device.type == "cuda":
        needed = estimate_memory(model, "ddp", MicroBatch(1, 1, 0), num_processes=args.world_size, bf16=args.bf16).state
        capacity = torch.cuda.get_device_properties(args.device).total_memory
        if needed > GPU_SHARE * capacity:
            logger.info(
                "--sharding auto: weights, gradients and optimizer need %.1f GiB, a GPU has %.1f GiB: FSDP2",
                needed / 2**30,
                capacity / 2**30,
            )
            use_fsdp2(args)
            args.fsdp_plugin_args = {}
    if args.fsdp:
        configure_fsdp2(args, model)
        return "fsdp2"
    return "single" if args.world_size == 1 else "ddp"


def configure_fsdp2(args: MetaMorphTrainingArguments, model: PreTrainedModel) -> None:
    """Name the layers that FSDP2 shards one by one, and the precisions.

    Inputs and outputs are not cast, as Accelerate's own policy would: the loss and what it is divided by are float32.
    Gradients are averaged in float32.

    Args:
        args: Its `fsdp_plugin_args` are completed.
        model: A MetaMorph model after `apply_stage`.

    Raises:
        ValueError: see [`layer_classes`].
    """
    given = {
        "fsdp_version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "state_dict_type": "SHARDED_STATE_DICT",
        "reshard_after_forward": True,
        "cpu_ram_efficient_loading": False,
        "transformer_cls_names_to_wrap": ",".join(layer_classes(model)),
    } | (args.fsdp_plugin_args or {})
    if given["fsdp_version"] == 2:
        given["mixed_precision_policy"] = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        )
    args.fsdp_plugin_args = given


def layer_classes(model: PreTrainedModel) -> list[str]:
    """Names of the classes whose modules are sharded one by one: layers of the decoder and of a tower that is trained.

    Args:
        model: A MetaMorph model after `apply_stage`.

    Raises:
        ValueError: if the language model does not say which of its modules are layers.
    """
    parts = [model.get_decoder()]
    if model.model.vision_tower.is_trained:
        parts.append(model.model.vision_tower.encoder)
    names = {name for part in parts for name in part._no_split_modules or ()}
    layers = sorted(names & {type(module).__name__ for part in parts for module in part.modules()})
    if not layers:
        raise ValueError(
            f"FSDP2 cannot shard {type(parts[0]).__name__}: it does not name its layers (_no_split_modules); use "
            "--sharding zero3"
        )
    return layers


@contextmanager
def whole_weights(args: MetaMorphTrainingArguments) -> Iterator[None]:
    """Load models inside as one process would, and let ZeRO-3 partition them afterwards.

    Transformers would partition each weight when it is loaded, but the model is composed of parts: rows are added to
    tables and weights tied, which needs them whole.

    Args:
        args: How the run learns.
    """
    plugin = args.deepspeed_plugin
    if plugin is None:
        yield
        return
    config = plugin.hf_ds_config
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(config)


class FrozenTower:
    """The frozen vision tower of a model in training: whole on every process, in the precision of the computation.

    Where an engine shards or partitions the model, the tower is taken out of the tree of modules, so that the engine
    does not see it: it is reached as before, as `model.model.vision_tower`, but has no weights to gather. Nor has it
    hooks: ZeRO-3 hangs when the order of calls changes on one process only, because its batch has no image. Of a tower
    whose token reduction is trained, it is the encoder that is taken out. What is saved are the weights as they were
    loaded, not rounded to bfloat16.

    Args:
        model: A MetaMorph model after `apply_stage`; changed in place.
        dtype: Precision of the tower; None leaves it as it is.
        device: Where it computes.
        outside: Whether to take it out of the tree.
        keep: Whether this process needs the original weights, in main memory, because it saves.
    """

    def __init__(
        self, model: PreTrainedModel, *, dtype: torch.dtype | None, device: torch.device, outside: bool, keep: bool
    ) -> None:
        tower = model.model.vision_tower
        self._original: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor] = {}
        self._parent, self._name = model.model, "vision_tower"
        if any(weight.requires_grad for weight in tower.parameters()):
            self._parent, self._name = tower, "encoder"
        self._path = TOWER if self._name == "vision_tower" else f"{TOWER}.encoder"
        if tower.is_trained:
            return
        frozen = getattr(self._parent, self._name)
        rounded = any(weight.dtype != dtype for weight in frozen.parameters()) if dtype is not None else False
        if keep and rounded:
            self._original = {name: weight.to("cpu", copy=True) for name, weight in frozen.state_dict().items()}
        frozen.to(device, dtype if rounded else None)
        frozen.eval()
        if outside:
            self._weights = frozen.state_dict()
            delattr(self._parent, self._name)
            object.__setattr__(self._parent, self._name, frozen)  # an attribute like any other: not a submodule

    def restore(self) -> None:
        """Put the tower back into the tree, with its original weights where they were kept."""
        frozen = getattr(self._parent, self._name)
        if self._original:
            frozen.to(next(iter(self._original.values())).dtype).load_state_dict(self._original)
        if self._name in vars(self._parent):
            object.__delattr__(self._parent, self._name)
            setattr(self._parent, self._name, frozen)
        self._original, self._weights = {}, {}

    def state_dict(self) -> dict[str, Tensor]:
        """Weights of the tower that replace, or are missing in, those of the model, by their names in the model."""
        return {f"{self._path}.{name}": weight for name, weight in (self._original or self._weights).items()}


def gather_weights(model: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """The whole weights of a model that an engine has sharded. Every process must call it.

    Args:
        model: What the engine made of the model: with FSDP2 the model itself, with DeepSpeed its `module`.
        keep: Whether this process wants them; the others get an empty result.

    Returns:
        The state of the model by name, in main memory where it was sharded; trained weights in float32.
    """
    if isinstance(model, FSDPModule):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return dict(get_model_state_dict(model, options=options))  # type: ignore[arg-type]  # of tensors only
    state = dict(model.state_dict()) if keep else {}  # of buffers; weights may be parts or rounded here
    shared: dict[int, Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) not in shared:
            shared[id(parameter)] = _gather_from_deepspeed(parameter, keep)
        if keep:
            state[name] = shared[id(parameter)]
    return state


def _gather_from_deepspeed(parameter: nn.Parameter, keep: bool) -> Tensor:
    """The float32 master of one parameter if it is trained, else its value."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    whole = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
    if whole is not None:
        shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 has partitioned it
        return whole.to("cpu", copy=True).view(shape) if keep else whole.new_empty(0)
    with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
        return parameter.detach().to("cpu", copy=True) if keep else parameter.detach().new_empty(0)
