"""FSDP2 for the visualizer: which modules are sharded, and the way from sharded tensors to whole ones and back.

Checkpoints hold whole tensors whatever the engine, so a run may resume with the other one or with other processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from metamorph.visualization.projector import VisualizationProjector
from metamorph.visualizer_training.denoising import Denoiser


def layers(model: Denoiser) -> Iterator[nn.Module]:
    """The modules that are sharded and compiled one by one: the projector and the blocks of the UNet."""
    yield model.projector
    yield from model.unet.down_blocks
    if model.unet.mid_block is not None:
        yield model.unet.mid_block
    yield from model.unet.up_blocks


def whole(values: Any, keep: bool = True) -> Any:
    """Put sharded tensors together, in dicts and lists of any depth. For all processes, if there are any such tensors.

    Args:
        values: Tensors, and other values, which are passed on.
        keep: Whether this process wants the result (on the CPU, where it was sharded).
    """
    if isinstance(values, DTensor):
        full = values.full_tensor().detach()
        return full.cpu() if keep else None
    if isinstance(values, dict):
        return {key: whole(value, keep) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return type(values)(whole(value, keep) for value in values)
    return values


def divided_like(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A whole tensor, the same on all processes, divided as `parameter` is; as it is where that is whole.

    Args:
        value: Of the parameter's shape, or a scalar, which is left as it is.
        parameter: A parameter of the model.
    """
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)


def whole_copy(model: Denoiser, state: dict[str, torch.Tensor], device: torch.device) -> Denoiser:
    """A sharded model as one process has it, of its whole weights."""
    projector = VisualizationProjector.from_config(model.projector.config)
    copy = Denoiser(projector, UNet2DConditionModel.from_config(model.unet.config), model.noise_scheduler)
    copy.load_state_dict(state)
    return copy.to(device)
