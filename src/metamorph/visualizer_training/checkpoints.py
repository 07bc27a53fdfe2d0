"""Checkpoints of the visualizer: complete or not there, found damaged when they are, and exact to the next sample."""

from __future__ import annotations

import json
import logging
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file
from torch import nn

from metamorph.files.model_files import check_finite
from metamorph.files.permissions import save_file
from metamorph.runs.checkpoint_files import (
    PREFIX,
    CheckpointError,
    begin_checkpoint,
    checkpoints,
    commit_checkpoint,
    damage,
    delete_old,
    explains_write_errors,
    flush,
    on_first_process,
)
from metamorph.runs.lock import check_lock
from metamorph.visualizer_training.arguments import LATEST
from metamorph.visualizer_training.fsdp2 import divided_like, whole


logger = logging.getLogger(__name__)

STATE_FILE = "state.json"
"""Step, place in the data, what decides the data, and flags."""
_WEIGHTS, _OPTIMIZER = "trained_weights.safetensors", "optimizer.pt"
_FLAGS = {"pictures": "--image_folder, --image_jsons", "digest": "--image_folder, --image_jsons", "seed": "--seed"}
"""What describes the data, and the flags that decide it."""


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
    data: dict[str, Any] = field(default_factory=dict)
    """What decides which picture comes when: `pictures`, `digest` and `seed`."""
    flags: dict[str, Any] = field(default_factory=dict)
    """Result of `flags_of_run`."""


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def save_checkpoint(output_dir: Path, state: TrainingState, keep: int | None, writes: bool = True) -> Path:
    """Write `output_dir/checkpoint-STEP`, then remove all but the newest `keep` checkpoints.

    Args:
        output_dir: Folder of the checkpoints.
        state: What to save.
        keep: Number of checkpoints to keep; None keeps all.
        writes: Whether this process writes. One does; of a sharded model the others must call it, too.

    Returns:
        The new folder.

    Raises:
        CheckpointError: If it cannot be written (a full disk, say); the last good one stays.
    """
    name = f"{PREFIX}{state.step}"
    weights = whole({key: value.detach() for key, value in trainable_parameters(state.model).items()}, keep=writes)
    tensors = {"optimizer": whole(state.optimizer.state_dict(), keep=writes)}
    tensors["lr_scheduler"] = state.lr_scheduler.state_dict()
    if state.ema is not None:
        tensors["ema"] = whole(state.ema.state_dict(), keep=writes)
    if not writes:
        return output_dir / name
    check_lock(output_dir)
    with explains_write_errors(output_dir, name):
        partial = begin_checkpoint(output_dir) / name
        partial.mkdir()
        save_file({key: value.contiguous() for key, value in weights.items()}, partial / _WEIGHTS)
        torch.save(tensors, partial / _OPTIMIZER)
        known = {"step": state.step, "samples_seen": state.samples_seen, "data": state.data, "flags": state.flags}
        (partial / STATE_FILE).write_text(json.dumps(known), encoding="utf-8")
        flush(output_dir)
        folder = commit_checkpoint(output_dir, name, {"step": state.step})
    delete_old(output_dir, keep)
    return folder


def load_checkpoint(folder: Path, state: TrainingState) -> None:
    """Restore `state` in place from a folder of `save_checkpoint`; learning rates and weight decay stay as they are.

    Raises:
        ValueError: if the folder was written by a run that trains other parameters.
        CheckpointError: if it was written by a run with other data, or holds more than tensors and numbers.
    """
    numbers = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    _check_data(folder, numbers["data"], state.data)
    weights = load_file(folder / _WEIGHTS)
    check_finite(weights.items(), folder / _WEIGHTS)
    parameters = trainable_parameters(state.model)
    if differing := sorted(weights.keys() ^ parameters.keys()):
        raise ValueError(
            f"--resume_from_checkpoint {folder} was written by a run that trains other weights "
            f"({len(differing)} differ, for example {differing[0]}); use the same --mode and --unfreeze_unet, or start "
            "anew in another --output_dir"
        )
    with torch.no_grad():
        for name, value in weights.items():
            if parameters[name].shape != value.shape:
                raise ValueError(
                    f"--resume_from_checkpoint {folder}: {name} has shape {list(value.shape)} there but "
                    f"{list(parameters[name].shape)} here; use the options it was trained with"
                )
            parameters[name].copy_(divided_like(value, parameters[name]))
    try:
        tensors = torch.load(folder / _OPTIMIZER, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"--resume_from_checkpoint {folder}: {_OPTIMIZER} holds more than tensors and numbers, which is refused "
            "because loading it can run code; resume from another checkpoint"
        ) from error
    if (state.ema is None) != ("ema" not in tensors):
        raise ValueError(f"--resume_from_checkpoint {folder}: switch --ema_decay on or off as it was there")
    in_groups = [value for group in state.optimizer.param_groups for value in group["params"]]
    for index, values in tensors["optimizer"]["state"].items():
        tensors["optimizer"]["state"][index] = {
            name: divided_like(value, in_groups[index]) for name, value in values.items()
        }
    given = [{name: group[name] for name in ("initial_lr", "weight_decay")} for group in state.optimizer.param_groups]
    rates, steps = state.lr_scheduler.base_lrs, tensors["lr_scheduler"]["last_epoch"]
    state.optimizer.load_state_dict(tensors["optimizer"])
    for group, values in zip(state.optimizer.param_groups, given, strict=True):
        group.update(values)
    state.lr_scheduler.load_state_dict({**tensors["lr_scheduler"], "base_lrs": rates, "last_epoch": steps - 1})
    state.lr_scheduler.step()  # sets the rates of this step
    if state.ema is not None:
        decay, device = state.ema.decay, next(iter(parameters.values())).device
        shadows = zip(tensors["ema"]["shadow_params"], parameters.values(), strict=True)
        tensors["ema"]["shadow_params"] = [divided_like(*pair) for pair in shadows]
        state.ema.load_state_dict(tensors["ema"])
        state.ema.to(device=device)
        state.ema.decay = decay
    state.step, state.samples_seen = numbers["step"], numbers["samples_seen"]
    logger.info("Resumed from %s: %d steps, %d samples", folder, state.step, state.samples_seen)


def find_checkpoint(request: str | None, output_dir: Path) -> Path | None:
    """As `resolve_resume`; with several processes, the first looks for it and tells the others.

    Raises:
        ValueError: as `resolve_resume`, on all processes.
        FileNotFoundError: if the folder is not on storage that all machines share.
    """
    folder = on_first_process(lambda: resolve_resume(request, output_dir))
    if folder is not None and not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is seen by the first process but not by process {dist.get_rank()} on this machine: put "
            "--output_dir on storage that all machines share"
        )
    return folder


def resolve_resume(request: str | None, output_dir: Path) -> Path | None:
    """The checkpoint folder to go on from, or None to start anew.

    Args:
        request: None or `latest`: the checkpoint of `output_dir` that was written last and is complete and undamaged,
            if any. "True": the same, but there must be one. "False": none. Otherwise the path of a checkpoint.
        output_dir: Folder of the run.

    Raises:
        ValueError: if the folder asked for is no checkpoint, or is damaged.
    """
    choice = LATEST if request is None else request
    folders = checkpoints(output_dir)
    if choice.lower() == "false":
        if folders:
            logger.warning("starting anew beside old checkpoints: a later resume would take %s", folders[-1])
        return None
    if choice.lower() not in (LATEST, "true"):
        folder = Path(choice).expanduser()
        problem = damage(folder)
        if problem is None and not (folder / STATE_FILE).is_file():
            problem = f"it is not one of the visualizer ({STATE_FILE})"
        if problem is not None:
            raise ValueError(f"--resume_from_checkpoint {folder} is not a checkpoint that can be used: {problem}")
        return folder
    for folder in reversed(folders):
        problem = damage(folder)
        if problem is None:
            logger.info("resuming from %s (--resume_from_checkpoint False starts anew)", folder)
            return folder
        logger.warning("skipping the checkpoint %s: %s", folder, problem)
    if choice.lower() == "true":
        raise ValueError(f"--resume_from_checkpoint True: there is no usable checkpoint in --output_dir {output_dir}")
    if folders:
        logger.warning("no checkpoint in %s is usable: starting anew", output_dir)
    return None


def _check_data(folder: Path, saved: dict[str, Any], present: dict[str, Any]) -> None:
    """Refuse to go on in the middle of an epoch of other data."""
    for name, flags in _FLAGS.items():
        if saved.get(name) != present.get(name):
            raise CheckpointError(
                f"--resume_from_checkpoint {folder} was trained on other data ({name} {saved.get(name)}, now "
                f"{present.get(name)}): give it the {flags} that it had. To go on with other data, start anew in "
                "another --output_dir with the projector and the UNet of a finished run"
            )
