"""What the asset builds share: a stateless order of data, a learning-rate curve, and a resumable state.

The data of step `n` are a function of (seed, n) alone, so the state to resume from is only the weights, the
optimizer's moments and the step. It is one safetensors file.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from metamorph.files.permissions import save_file
from metamorph.runs.determinism import deterministic_algorithms


logger = logging.getLogger(__name__)

STATE_FILE = "training_state.safetensors"


def step_rng(seed: int, stream: int, step: int) -> np.random.Generator:
    """The generator that draws the data of one step; `stream` keeps training and evaluation apart."""
    return np.random.default_rng([seed, stream, step])


def warmup_cosine(step: int, total: int, warmup: int) -> float:
    """Factor of the peak learning rate at `step` (from 0): linear warm-up, then a cosine to 2 %."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


@dataclass(frozen=True)
class TrainingSchedule:
    """How long and how fast an asset trains."""

    steps: int
    """Number of optimizer steps."""
    learning_rate: float
    """Peak learning rate of AdamW."""
    warmup_steps: int
    """Steps of linear warm-up."""
    weight_decay: float = 0.01
    """Decoupled weight decay of AdamW, on matrices only."""
    adam_beta2: float = 0.98
    """Second moment's decay of AdamW; lower than the default, as the runs are short."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    save_every: int = 200
    """Steps between two saves of the resumable state."""
    log_every: int = 50
    """Steps between two lines of the log."""


@deterministic_algorithms(torch.device("cpu"))
def train(
    modules: nn.Module,
    schedule: TrainingSchedule,
    loss_of_step: Callable[[int], tuple[Tensor, dict[str, float]]],
    state_folder: Path,
    *,
    fingerprint: str,
    resume: bool,
) -> float:
    """Train `modules` by `schedule`, saving a state to resume from.

    Args:
        modules: Everything that is trained.
        schedule: Steps and rates.
        loss_of_step: Maps the step's number to the loss and to figures for the log.
        state_folder: Where the state is kept; it is removed by the caller once the asset is written.
        fingerprint: Names seed and recipe; a state of another fingerprint is not resumed.
        resume: Whether to continue from a state found in `state_folder`.

    Returns:
        Wall-clock seconds of training, over all resumed parts.

    Raises:
        FloatingPointError: The loss is not finite.
    """
    state_path = state_folder / STATE_FILE
    state_folder.mkdir(parents=True, exist_ok=True)
    optimizer = _optimizer(modules, schedule)
    first_step, seconds_before = 0, 0.0
    if resume and state_path.is_file():
        first_step, seconds_before = _load_state(state_path, modules, optimizer, fingerprint)
    began = time.perf_counter()
    modules.train()
    for step in range(first_step, schedule.steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate * warmup_cosine(step, schedule.steps, schedule.warmup_steps)
        loss, figures = loss_of_step(step)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"The loss at step {step} is {loss.item()}: lower the learning rate.")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(modules.parameters(), schedule.max_grad_norm)
        optimizer.step()
        done = step + 1
        seconds = seconds_before + time.perf_counter() - began
        if done % schedule.log_every == 0 or done == schedule.steps:
            shown = " ".join(f"{key} {value:.4f}" for key, value in figures.items())
            logger.info("step %d/%d loss %.4f %s (%.0f s)", done, schedule.steps, loss.item(), shown, seconds)
        if done % schedule.save_every == 0 or done == schedule.steps:
            _save_state(state_path, modules, optimizer, done, seconds, fingerprint)
    return seconds_before + time.perf_counter() - began


def _optimizer(modules: nn.Module, schedule: TrainingSchedule) -> torch.optim.AdamW:
    trained = [parameter for parameter in modules.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": schedule.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=schedule.learning_rate, betas=(0.9, schedule.adam_beta2))


def _named_state(modules: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    tensors = {f"model.{name}": value for name, value in modules.state_dict().items()}
    for name, parameter in modules.named_parameters():
        for moment, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{moment}.{name}"] = value
    return tensors


def _save_state(
    path: Path,
    modules: nn.Module,
    optimizer: torch.optim.AdamW,
    step: int,
    seconds: float,
    fingerprint: str,
) -> None:
    tensors = {key: value.detach().clone().contiguous() for key, value in _named_state(modules, optimizer).items()}
    facts = json.dumps({"step": step, "seconds": seconds, "fingerprint": fingerprint})
    temporary = path.with_suffix(".partial")
    save_file(tensors, temporary, metadata={"training": facts})
    temporary.replace(path)


def _load_state(path: Path, modules: nn.Module, optimizer: torch.optim.AdamW, fingerprint: str) -> tuple[int, float]:
    with safe_open(path, framework="pt") as file:
        facts = json.loads(file.metadata()["training"])
        if facts["fingerprint"] != fingerprint:
            logger.warning("%s is of another recipe or seed: starting over.", path)
            return 0, 0.0
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - a safetensors file cannot be iterated
    modules.load_state_dict(
        {key.removeprefix("model."): value for key, value in tensors.items() if key.startswith("model.")}
    )
    for name, parameter in modules.named_parameters():
        for moment in ("step", "exp_avg", "exp_avg_sq"):
            key = f"optimizer.{moment}.{name}"
            if key in tensors:
                optimizer.state[parameter][moment] = tensors[key]
    logger.info("resuming %s at step %d", path, facts["step"])
    return facts["step"], facts["seconds"]
