"""What a training run reports in each log line: speed, waiting, memory and gradients, over all ranks.

Between two log lines nothing is read back from the device: work is summed there, time is taken on the host. The one
exception is a pause (evaluation, samples, a checkpoint), before which the device is waited for, so that its time is
not counted as training.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from transformers import IntervalStrategy, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from metamorph.models.losses import sum_dtype


logger = logging.getLogger(__name__)


@dataclass
class Window:
    """What happened since the last log line, over all ranks."""

    work: Tensor
    """float64 [quantities] on the CPU: sums of what `RunMonitor.work_of` counts."""
    samples: float
    """Samples of all ranks."""
    seconds: float
    """Time without pauses, of the slowest rank."""
    waited: float
    """Time spent waiting for data, of the rank that waited longest."""
    peak: float
    """Largest memory of a rank so far, in bytes."""


class RunMonitor(TrainerCallback):
    """Measures a run between log lines.

    The trainer waits for its batches within `wait` and counts them by `count`, asks `drain` for the values of a log
    line, and wraps in `pause` what is no training. A subclass may count more than samples.

    Args:
        accelerator: Gathers over the ranks.
        module_of: The part of the model that a parameter belongs to, by its name.
    """

    def __init__(self, accelerator: Accelerator, module_of: Callable[[str], str]) -> None:
        self.accelerator = accelerator
        self.module_of = module_of
        self.skipped_records: Callable[[], int] = lambda: 0
        self.total_samples = 0.0
        """Samples of all ranks since this process began, without those before a resume."""
        self._norms: dict[str, Tensor] = {}
        self._window: Window | None = None
        self._steps = 0
        self._started: float | None = None
        self._clear()

    def _clear(self) -> None:
        """Forget what this rank has counted by itself."""
        self._work: Tensor | None = None
        self._samples = 0
        self._waited = self._paused = 0.0

    def work_of(self, batch: dict[str, Any]) -> Tensor:
        """What a subclass counts in a batch, `[quantities]` on the batch's device; here nothing."""
        return torch.zeros(0, device=self.accelerator.device)

    def samples_of(self, batch: dict[str, Any]) -> int:
        """Number of samples in a batch."""
        return len(next(iter(batch.values())))

    def report(self, work: Tensor, seconds: float) -> dict[str, float]:
        """What a log line says of the work of its window.

        Args:
            work: float64 `[quantities]`, over all ranks.
            seconds: Its duration.
        """
        return {}

    def advance(self, state: TrainerState, work: Tensor) -> None:
        """Advance the counters in `state`, which a checkpoint keeps, by `work` `[quantities]` of all ranks."""

    @contextmanager
    def wait(self) -> Iterator[None]:
        """What happens within is waiting for data."""
        began = time.perf_counter()
        if self._started is None:
            self._started = began
        yield
        self._waited += time.perf_counter() - began

    def count(self, batches: Sequence[dict[str, Any]]) -> None:
        """Count what is in the micro-batches of one optimizer step."""
        if batches:
            self._steps += 1
        for batch in batches:
            work = self.work_of(batch)
            self._work = work if self._work is None else self._work + work
            self._samples += self.samples_of(batch)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """What happens within is not counted as training time; the device is waited for before and after."""
        self._synchronize()
        began = time.perf_counter()
        try:
            yield
        finally:
            self._synchronize()
            if self._started is not None:  # else the clock does not run yet
                self._paused += time.perf_counter() - began

    def drain(self, state: TrainerState, grad_norm: float | None) -> dict[str, float]:
        """The values of a log line, over all ranks. Every rank must call it.

        Args:
            state: Its counters are advanced.
            grad_norm: Norm of all gradients of the last step before clipping, as Trainer logs it.

        Returns:
            See `docs/observability.md`. Empty where nothing was trained since the last call.
        """
        logs = self._module_norms(grad_norm)
        self.settle(state)
        window, steps = self._window, self._steps
        self._window, self._steps = None, 0
        if window is None:
            return logs
        return {
            **logs,
            "step_seconds": window.seconds / steps,
            "data_wait_share": window.waited / window.seconds,
            "samples_per_second": window.samples / window.seconds,
            "peak_memory_gib": window.peak / 2**30,
            "skipped_records": self.skipped_records(),
            **self.report(window.work, window.seconds),
        }

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Take the gradient norm of each module, on the device, where this step's log line will want it."""
        if model is not None and _will_log(args, state, state.global_step + 1):
            self._norms = gradient_norms(model, self.module_of)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The last step has a log line, too."""
        if state.global_step >= state.max_steps and args.logging_strategy != IntervalStrategy.NO:
            control.should_log = True

    def _module_norms(self, grad_norm: float | None) -> dict[str, float]:
        """`grad_norm_MODULE` before clipping.

        Gradients have been clipped when they are measured. Clipping multiplies all of them by the same number, and
        their total norm before it is known.
        """
        if not self._norms:
            return {}
        values = torch.stack(list(self._norms.values())).tolist()
        names = [f"grad_norm_{module}" for module in self._norms]
        self._norms = {}
        total = math.hypot(*values)
        scale = grad_norm / total if grad_norm is not None and math.isfinite(grad_norm) and total > 0 else 1.0
        return {name: value * scale for name, value in zip(names, values, strict=True)}

    def settle(self, state: TrainerState) -> None:
        """Sum over the ranks what each has counted by itself. Every rank must call it.

        A checkpoint needs it, too: the counters in `state` shall go on from there.
        """
        if self._work is None or self._started is None:
            return
        self._synchronize()
        now = time.perf_counter()
        seconds = max(now - self._started - self._paused, 1e-9)
        counted = self._work.to(sum_dtype(self._work.device))
        own = counted.new_tensor([self._samples, seconds, self._waited, peak_memory(self.accelerator.device)])
        ranks = self.accelerator.gather(torch.cat([counted, own]).unsqueeze(0)).cpu().double()
        work, samples = ranks[:, :-4].sum(dim=0), ranks[:, -4].sum().item()  # [ranks, quantities + 4]
        seconds, waited, peak = ranks[:, -3:].max(dim=0).values.tolist()
        self._clear()
        self._started = now
        self.total_samples += samples
        self.advance(state, work)
        before = self._window
        if before is not None:
            work, samples = work + before.work, samples + before.samples
            seconds, waited = seconds + before.seconds, waited + before.waited
        self._window = Window(work, samples, seconds, waited, peak)

    def _synchronize(self) -> None:
        if self.accelerator.device.type != "cpu":
            torch.accelerator.synchronize(self.accelerator.device)


def gradient_norms(model: nn.Module, module_of: Callable[[str], str]) -> dict[str, Tensor]:
    """The 2-norm of the gradients of each module, 0-d tensors on the device; sharded gradients are joined.

    Empty under DeepSpeed, which keeps gradients to itself.

    Args:
        model: With gradients.
        module_of: The module of a parameter, by its name.
    """
    gradients: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradients.setdefault(module_of(name.replace("_orig_mod.", "")), []).append(parameter.grad)
    norms = {module: get_total_norm(tensors) for module, tensors in gradients.items()}
    return {module: norm.full_tensor() if hasattr(norm, "full_tensor") else norm for module, norm in norms.items()}


def peak_memory(device: torch.device) -> float:
    """Largest memory of this process so far in bytes: allocated on the device, or resident on a CPU.

    Args:
        device: Where the model is.
    """
    if device.type == "mps":  # it keeps no maximum
        return torch.mps.driver_allocated_memory()
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(device)
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak if sys.platform == "darwin" else peak * 1024)


def _will_log(args: TrainingArguments, state: TrainerState, step: int) -> bool:
    """Whether Trainer's own callback will ask for a log line after this step (or may, at the end of an epoch)."""
    if args.logging_first_step and step == 1:
        return True
    if step >= state.max_steps:
        return args.logging_strategy != IntervalStrategy.NO
    if args.logging_strategy == IntervalStrategy.STEPS:
        return step % state.logging_steps == 0
    return args.logging_strategy == IntervalStrategy.EPOCH
