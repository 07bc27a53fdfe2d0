"""FSDP2 for the visualizer: which modules are sharded, and conversion of tensors to and from shards.

Checkpoints hold unsharded tensors with every engine, so a run may resume with another one or another number of
processes.
"""

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


def gather(values: Any, keep: bool = True) -> Any:
    """Gather the sharded tensors in nested dicts and lists; other values are returned unchanged.

    If there are sharded tensors, all processes must call it. Those with `keep` get them on the CPU, the others None.
    """
    if isinstance(values, DTensor):
        full = values.full_tensor().detach()
        return full.cpu() if keep else None
    if isinstance(values, dict):
        return {key: gather(value, keep) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return type(values)(gather(value, keep) for value in values)
    return values


def shard_like(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Shard a tensor, which is the same on all processes, like a parameter of its shape; scalars stay unchanged."""
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)


def unsharded_copy(model: Denoiser, state: dict[str, torch.Tensor], device: torch.device) -> Denoiser:
    """A plain copy of a sharded model, with its unsharded weights `state`."""
    projector = VisualizationProjector.from_config(model.projector.config)
    copy = Denoiser(projector, UNet2DConditionModel.from_config(model.unet.config), model.noise_scheduler)
    copy.load_state_dict(state)
    return copy.to(device)
