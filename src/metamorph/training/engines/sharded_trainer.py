"""`transformers.Trainer` on any engine: the frozen tower outside of what is sharded, and whole weights when saving."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import TrainOutput


TOWER = "model.vision_tower"
"""Path of the vision tower in a MetaMorph model."""


class ShardedTrainer(Trainer):
    """`transformers.Trainer` that writes the same folder whatever the engine.

    Args:
        tower_on_device: Whether the frozen vision tower computes. Else it stays in main memory, out of the tree of
            modules, so that nothing moves it.
        **kwargs: As for `transformers.Trainer`.
    """

    def __init__(self, *, tower_on_device: bool = True, **kwargs: Any) -> None:
        self.frozen_tower: FrozenTower | None = None
        if not tower_on_device:  # before Trainer moves the model
            self.frozen_tower = FrozenTower(
                kwargs["model"], dtype=None, device=torch.device("cpu"), outside=True, keep=False
            )
        super().__init__(**kwargs)
        self.plain_model = self.model  # FSDP2 and torch.compile may put others in its place

    @property
    def is_sharded(self) -> bool:
        """Whether the weights of the model are now those of an engine: divided among processes, or DeepSpeed's."""
        if self.is_deepspeed_enabled:
            return self.model_wrapped is not self.plain_model
        return isinstance(self.plain_model, FSDPModule)

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> TrainOutput:
        """Train, with the frozen vision tower in its place.

        Args:
            resume_from_checkpoint: Folder of a checkpoint.
            **kwargs: As for `transformers.Trainer.train`.
        """
        if self.frozen_tower is None:
            self.frozen_tower = FrozenTower(
                self.plain_model,
                dtype=torch.bfloat16 if self.args.bf16 else None,
                device=self.args.device,
                outside=self.is_fsdp_enabled or self.is_deepspeed_enabled,
                keep=self.args.should_save,
            )
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def whole_state_dict(self) -> dict[str, Tensor]:
        """The weights as one process would have them. Every process must call it; only those that save get them."""
        keep = self.args.should_save
        state = gather_weights(self.plain_model, keep=keep) if self.is_sharded else self.plain_model.state_dict()
        return state if self.frozen_tower is None else state | self.frozen_tower.state_dict()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what the stage trains as a plain folder. Every process must call it.

        Trainer has a way of its own for each engine, some of which write shards only, or weights in bfloat16.

        Args:
            output_dir: By default the folder of the run.
            _internal_call: Set by Trainer for checkpoints, which it pushes to the Hub itself.
        """
        self._save(output_dir or self.args.output_dir, state_dict=self.whole_state_dict())
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def release_tower(self) -> None:
        """Make the vision tower of the trained model whole again, with the weights that it was loaded with.

        On processes that do not save they stay in the precision of the computation.
        """
        if self.frozen_tower is not None:
            self.frozen_tower.restore()
            self.frozen_tower = None
            if not self.is_sharded:
                self.plain_model.model.vision_tower.to(self.args.device)


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
