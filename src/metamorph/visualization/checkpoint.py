"""Checkpoints of the visualizer: written beside their place and renamed, so a half-written one is never found."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import nn

from metamorph.visualization.arguments import LATEST


logger = logging.getLogger(__name__)

_NAME = re.compile(r"checkpoint-(\d+)")
_PARTIAL = ".partial-"
_WEIGHTS, _OPTIMIZER, _STATE = "trained_weights.safetensors", "optimizer.pt", "state.json"


@dataclass
class TrainingState:
    """Everything that changes in training. Noise and order are functions of the position, so they need no state."""

    model: nn.Module
    """The unwrapped model; only its trainable parameters are saved."""
    optimizer: torch.optim.Optimizer
    """Optimizer of these parameters."""
    lr_scheduler: Any
    """Learning-rate schedule."""
    ema: EMAModel | None
    """Moving average of these parameters."""
    step: int = 0
    """Optimizer steps done."""
    samples_seen: int = 0
    """Samples, over all processes, that these steps have consumed."""


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def save_checkpoint(output_dir: Path, state: TrainingState, keep: int | None) -> Path:
    """Write `output_dir/checkpoint-STEP`, then remove all but the newest `keep` checkpoints.

    Args:
        output_dir: Folder of the checkpoints.
        state: What to save.
        keep: Number of checkpoints to keep; None keeps all.

    Returns:
        The new folder.
    """
    folder = output_dir / f"checkpoint-{state.step}"
    with complete_folder(folder) as partial:
        weights = {name: value.detach().contiguous() for name, value in trainable_parameters(state.model).items()}
        save_file(weights, partial / _WEIGHTS)
        tensors = {"optimizer": state.optimizer.state_dict(), "lr_scheduler": state.lr_scheduler.state_dict()}
        if state.ema is not None:
            tensors["ema"] = state.ema.state_dict()
        torch.save(tensors, partial / _OPTIMIZER)
        numbers = {"step": state.step, "samples_seen": state.samples_seen}
        (partial / _STATE).write_text(json.dumps(numbers), encoding="utf-8")
    if keep is not None:
        for old in find_checkpoints(output_dir)[:-keep]:
            shutil.rmtree(old)
    return folder


def load_checkpoint(folder: Path, state: TrainingState) -> None:
    """Restore `state` in place from a folder of `save_checkpoint`.

    Raises:
        ValueError: if the folder was written by a run that trains other parameters.
    """
    weights = load_file(folder / _WEIGHTS)
    parameters = trainable_parameters(state.model)
    if differing := sorted(weights.keys() ^ parameters.keys()):
        raise ValueError(
            f"--resume_from_checkpoint {folder} was written by a run that trains other weights "
            f"({len(differing)} differ, for example {differing[0]}); use the same --mode and --unfreeze_unet"
        )
    with torch.no_grad():
        for name, value in weights.items():
            if parameters[name].shape != value.shape:
                raise ValueError(
                    f"--resume_from_checkpoint {folder}: {name} has shape {list(value.shape)} there but "
                    f"{list(parameters[name].shape)} here; use the options it was trained with"
                )
            parameters[name].copy_(value)
    tensors = torch.load(folder / _OPTIMIZER, map_location="cpu", weights_only=True)
    if (state.ema is None) != ("ema" not in tensors):
        raise ValueError(f"--resume_from_checkpoint {folder}: switch --ema_decay on or off as it was there")
    state.optimizer.load_state_dict(tensors["optimizer"])
    state.lr_scheduler.load_state_dict(tensors["lr_scheduler"])
    if state.ema is not None:
        decay, device = state.ema.decay, next(iter(parameters.values())).device
        state.ema.load_state_dict(tensors["ema"])
        state.ema.to(device=device)
        state.ema.decay = decay
    numbers = json.loads((folder / _STATE).read_text(encoding="utf-8"))
    state.step, state.samples_seen = numbers["step"], numbers["samples_seen"]
    logger.info("Resumed from %s: %d steps, %d samples", folder, state.step, state.samples_seen)


def find_checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints of a folder, oldest first."""
    found = [
        (int(match.group(1)), path)
        for path in output_dir.glob("checkpoint-*")
        if (match := _NAME.fullmatch(path.name)) and (path / _STATE).is_file()
    ]
    return [path for _, path in sorted(found)]


def resolve_resume(resume_from_checkpoint: str | None, output_dir: Path) -> Path | None:
    """The checkpoint folder to go on from, or None to start anew.

    Raises:
        ValueError: if the folder asked for is no checkpoint, or if a new run would mix with an old one's checkpoints.
    """
    present = find_checkpoints(output_dir)
    if resume_from_checkpoint == LATEST:
        return present[-1] if present else None
    if resume_from_checkpoint is not None:
        folder = Path(resume_from_checkpoint).expanduser()
        if not (folder / _STATE).is_file():
            raise ValueError(f"--resume_from_checkpoint {folder} is not a checkpoint of the visualizer ({_STATE})")
        return folder
    if present:
        raise ValueError(
            f"--output_dir {output_dir} holds {present[-1].name} of an earlier run; go on with "
            f"--resume_from_checkpoint {LATEST}, or choose another folder"
        )
    return None


@contextmanager
def complete_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `folder` when the block ends without an error."""
    partial = folder.with_name(_PARTIAL + folder.name)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)
