"""Weights under any engine: the frozen tower, which is not sharded, and full weights for saving."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel


TOWER = "model.vision_tower"
"""Path of the vision tower in a MetaMorph model."""


class FrozenTower:
    """The frozen vision tower of a model in training: complete on every process, in the precision of the computation.

    If an engine shards the model, the tower is removed from the module tree, so that the engine does not see it: it is
    still `model.model.vision_tower`, but has no weights to gather and no hooks. (ZeRO-3 hangs when a process skips the
    tower because its batch has no image.) If the token reduction is trained, only the encoder is removed. Saved are the
    weights as they were loaded, not rounded to bfloat16.

    The model, which is one after `apply_stage`, is changed in place. A `dtype` of None keeps the tower's; `outside`
    removes it from the module tree; a process that saves must `keep` the original weights in main memory.
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
            object.__setattr__(self._parent, self._name, frozen)  # a plain attribute, not a submodule

    def restore(self) -> None:
        """Put the tower back into the module tree, with its original weights if they were kept."""
        frozen = getattr(self._parent, self._name)
        if self._original:
            frozen.to(next(iter(self._original.values())).dtype).load_state_dict(self._original)
        if self._name in vars(self._parent):
            object.__delattr__(self._parent, self._name)
            setattr(self._parent, self._name, frozen)
        self._original, self._weights = {}, {}

    def state_dict(self) -> dict[str, Tensor]:
        """Weights of the tower that the model lacks or has rounded, by their names in the model."""
        return {f"{self._path}.{name}": weight for name, weight in (self._original or self._weights).items()}


def gather_weights(model: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """The full state dict of a model that an engine has sharded. Every process must call it.

    Sharded weights are in main memory, trained ones in float32. Without `keep` the result is empty.
    """
    if isinstance(model, FSDPModule):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        full: dict[str, Any] = get_model_state_dict(model, options=options)
        first: dict[int, str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False) if full else ():
            full[name] = full[first.setdefault(id(parameter), name)]  # tied weights stay tied: they are saved once
        return full
    state = dict(model.state_dict()) if keep else {}  # for the buffers; weights may be partitioned or rounded
    shared: dict[int, Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) not in shared:
            shared[id(parameter)] = _gather_from_deepspeed(parameter, keep)
        if keep:
            state[name] = shared[id(parameter)]
    return state


def _gather_from_deepspeed(parameter: nn.Parameter, keep: bool) -> Tensor:
    """The float32 master weight of a trained parameter, or the value of a frozen one."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    full = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
    if full is not None:
        shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 has partitioned it
        return full.to("cpu", copy=True).view(shape) if keep else full.new_empty(0)
    with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
        return parameter.detach().to("cpu", copy=True) if keep else parameter.detach().new_empty(0)
