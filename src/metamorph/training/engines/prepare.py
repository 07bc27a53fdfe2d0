"""Prepares a model for training: the engine of `--sharding`, attention, and the options that save time and memory.

Every engine keeps float32 master weights of what is trained and computes in bfloat16 with `--bf16`. The engines are
those of Accelerate (DDP, FSDP2) and DeepSpeed (ZeRO); this module configures them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import PreTrainedModel
from transformers.integrations import set_hf_deepspeed_config, unset_hf_deepspeed_config

from metamorph.training.arguments import MetaMorphTrainingArguments, RunArguments
from metamorph.training.arguments.sharding import use_fsdp2
from metamorph.training.arguments.shared import RunTrainingArguments
from metamorph.training.costs.memory import MicroBatch, estimate_run
from metamorph.training.engines.attention import check_keeps_samples_apart, choose_attention
from metamorph.training.engines.speed import prepare_speed
from metamorph.training.engines.weights import TOWER
from metamorph.training.lora import check_engine, store_frozen_matrices
from metamorph.training.optimizer import check_optimizer


logger = logging.getLogger(__name__)

GPU_SHARE = 0.7
"""Fraction of a GPU that weights, gradients and optimizer may take before `auto` shards them; the rest is for
activations."""


def prepare_model(model: PreTrainedModel, args: RunArguments) -> None:
    """Set up attention, and the options that save time and memory, of a model after `apply_stage`.

    Call it before the trainer is made.
    """
    store_frozen_matrices(model, args)
    if args.training.packing and model.get_decoder().device.type != "meta":  # else the first process tests it
        check_keeps_samples_apart(model)
    choose_attention(model, args)
    prepare_speed(model, args.training)
    _give_addresses(model)


def prepare_engine(run: RunArguments, outline: PreTrainedModel | None) -> str:
    """Decide what `--sharding auto` is, and configure FSDP2, in `run.training`.

    `auto` is FSDP2 if there are several GPUs and one cannot hold weights, gradients and optimizer, else DDP. `outline`
    is the model after `apply_stage`, possibly on the meta device; a single process and DeepSpeed need none.

    The result is `single`, a value of `--sharding`, or `deepspeed` if Transformers' own flag configures it.
    """
    args = run.training
    if args.deepspeed_plugin is not None:
        return args.sharding if args.sharding != "auto" else "deepspeed"
    if outline is None:
        return "single"
    if args.sharding == "auto" and not args.fsdp and args.device.type == "cuda":
        needed = estimate_run(run, outline, "ddp", MicroBatch(1, 1, 0), args.world_size).state
        capacity = torch.cuda.get_device_properties(args.device).total_memory
        if needed > GPU_SHARE * capacity:
            logger.info(
                "--sharding auto: weights, gradients and optimizer need %.1f GiB, a GPU has %.1f GiB: FSDP2",
                needed / 2**30,
                capacity / 2**30,
            )
            use_fsdp2(args)
            check_optimizer(args)
            check_engine(run)
            args.fsdp_plugin_args = {}
    if args.fsdp:
        configure_fsdp2(args, layer_classes(outline), read_once=consists_of_parameters(outline))
        if args.dp_replicate > 1:
            shards = args.world_size // args.dp_replicate
            logger.info("--dp_replicate: %d groups of %d processes, each with all weights", args.dp_replicate, shards)
        return "fsdp2"
    return "ddp"


def configure_fsdp2(args: RunTrainingArguments, layers: Iterable[str], *, read_once: bool = False) -> None:
    """Complete `fsdp_plugin_args`: precision, and `layers`, the classes whose modules FSDP2 shards one by one.

    With `read_once`, unless `--fsdp_config` forbids it, Accelerate sends weights from the first process to the others.

    Inputs and outputs are not cast, as Accelerate's own policy would do: the loss and its normaliser are float32.
    Gradients are averaged in float32, after every micro-batch: with accumulation, each GPU would otherwise keep all of
    them unsharded until the last one.
    """
    given = {
        "fsdp_version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "state_dict_type": "SHARDED_STATE_DICT",
        "reshard_after_forward": True,
        "transformer_cls_names_to_wrap": ",".join(layers),
    } | (args.fsdp_plugin_args or {})
    if given["fsdp_version"] == 2:
        # Transformers has filled in false where nothing was given.
        allowed = str((args.fsdp_config or {}).get("cpu_ram_efficient_loading", True)).lower() == "true"
        given["cpu_ram_efficient_loading"] = read_once and allowed
        given["mixed_precision_policy"] = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        )
    args.fsdp_plugin_args = given
    accumulation = {"sync_each_batch": True} | (args.accelerator_config.gradient_accumulation_kwargs or {})
    args.accelerator_config.gradient_accumulation_kwargs = accumulation


def reads_on_first_process(args: RunTrainingArguments) -> bool:
    """Whether only the first process reads the weights, after `configure_fsdp2`."""
    plugin = (args.fsdp and args.fsdp_plugin_args) or {}
    return plugin.get("fsdp_version") == 2 and bool(plugin["cpu_ram_efficient_loading"])


def _give_addresses(model: PreTrainedModel) -> None:
    """Give trained weights on the meta device, in place, an address of their own: one element of memory.

    By address, Accelerate finds the shard that replaces a weight in the optimizer. On the meta device all have 0.
    """
    for weight in model.parameters():
        if weight.is_meta and weight.requires_grad:
            torch.utils.swap_tensors(weight, nn.Parameter(torch.empty(1, dtype=weight.dtype).expand(weight.shape)))


def consists_of_parameters(model: PreTrainedModel) -> bool:
    """Whether checkpoints hold parameters only, besides a frozen tower. Accelerate cannot send the buffers of others.

    Some mixtures of experts have such buffers, and DINOv2.
    """
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = model.state_dict().keys() - parameters
    return not buffers or (
        not model.model.vision_tower.is_trained and all(name.startswith(f"{TOWER}.encoder.") for name in buffers)
    )


def layer_classes(model: PreTrainedModel) -> list[str]:
    """Names of the classes whose modules are sharded one by one: layers of the decoder and of a trained tower."""
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
def gathered_weights(args: MetaMorphTrainingArguments) -> Iterator[None]:
    """Load full weights inside this context also under ZeRO-3, which partitions them afterwards.

    Transformers would partition each weight when it is loaded, but the model is composed of parts: adding rows to
    tables and tying weights needs all of them.
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
