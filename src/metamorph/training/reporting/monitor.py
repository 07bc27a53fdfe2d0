"""Measurements of a run for its log entries: speed, data waiting, memory and gradient norms, over all ranks.

Between two log entries nothing is read back from the device: work is summed there, time is taken on the host. The one
exception is a pause (evaluation, samples, a checkpoint): the device is synchronized before it, so that its time does
not count as training.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from transformers import IntervalStrategy, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from metamorph.models.losses import sum_dtype


class RunMonitor(TrainerCallback):
    """Measures a run between log entries.

    The trainer fetches batches within `wait`, counts them with `count`, gets the values of a log entry from
    `pop_metrics`, and wraps in `pause` what is not training. A subclass may count more than samples. `module_of` maps
    the name of a parameter to the part of the model that it belongs to.
    """

    def __init__(self, accelerator: Accelerator, module_of: Callable[[str], str]) -> None:
        self.accelerator = accelerator
        self.module_of = module_of
        self.skipped_records: Callable[[], int] = lambda: 0
        self.total_samples = 0.0
        """Samples of all ranks since this process started, without those before a resume."""
        self._norms: dict[str, Tensor] = {}
        self._steps = 0
        self._started: float | None = None
        # Counted by this rank since the last `sync`.
        self._work: Tensor | None = None
        self._samples = 0
        self._waited = self._paused = 0.0
        # Of all ranks since the last log entry: work and samples, seconds and waiting, peak memory in bytes.
        self._sums: Tensor | float = 0.0
        self._times: Tensor | float = 0.0
        self._peak = 0.0

    def work_of(self, batch: dict[str, Any]) -> Tensor:
        """Quantities that a subclass counts in a batch, `[quantities]` on its device."""
        return torch.zeros(0, device=self.accelerator.device)

    def samples_of(self, batch: dict[str, Any]) -> int:
        """Number of samples in a batch."""
        return len(next(iter(batch.values())))

    def report(self, work: Tensor, seconds: float) -> dict[str, float]:
        """Values of a log entry for its work (float64 `[quantities]`, over all ranks) and duration."""
        return {}

    def advance(self, state: TrainerState, work: Tensor) -> None:
        """Add `work` `[quantities]` of all ranks to the counters in `state`, which checkpoints contain."""

    @contextmanager
    def wait(self) -> Iterator[None]:
        """Count the time inside as waiting for data."""
        began = time.perf_counter()
        if self._started is None:
            self._started = began
        yield
        self._waited += time.perf_counter() - began

    def count(self, batches: Sequence[dict[str, Any]]) -> None:
        """Count the micro-batches of one optimizer step."""
        if batches:
            self._steps += 1
        for batch in batches:
            work = self.work_of(batch)
            self._work = work if self._work is None else self._work + work
            self._samples += self.samples_of(batch)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Do not count the time inside as training; the device is synchronized before and after."""
        self._synchronize()
        began = time.perf_counter()
        try:
            yield
        finally:
            self._synchronize()
            if self._started is not None:  # otherwise the clock has not started
                self._paused += time.perf_counter() - began

    def pop_metrics(self, state: TrainerState, grad_norm: float | None) -> dict[str, float]:
        """The values of a log entry, over all ranks; see `docs/observability.md`. Every rank must call it.

        The counters of `state` are updated. `grad_norm` is that of the last step before clipping, as Trainer logs it.
        """
        logs = self._module_norms(grad_norm)
        self.sync(state)
        sums, times, steps = self._sums, self._times, self._steps
        self._sums, self._times, self._steps = 0.0, 0.0, 0
        if not (isinstance(sums, Tensor) and isinstance(times, Tensor)):  # nothing was trained since the last call
            return logs
        seconds, waited = times.tolist()
        return {
            **logs,
            "step_seconds": seconds / steps,
            "data_wait_share": waited / seconds,
            "samples_per_second": sums[-1].item() / seconds,
            "peak_memory_gib": self._peak / 2**30,
            "skipped_records": self.skipped_records(),
            **self.report(sums[:-1], seconds),
        }

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Compute the gradient norm of each module, on the device, if this step is logged."""
        if model is not None and _will_log(args, state, state.global_step + 1):
            self._norms = gradient_norms(model, self.module_of)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Also log the last step."""
        if state.global_step >= state.max_steps and args.logging_strategy != IntervalStrategy.NO:
            control.should_log = True

    def _module_norms(self, grad_norm: float | None) -> dict[str, float]:
        """`grad_norm_MODULE` before clipping."""
        if not self._norms:
            return {}
        values = torch.stack(list(self._norms.values())).tolist()
        names = [f"grad_norm_{module}" for module in self._norms]
        self._norms = {}
        # They are measured after clipping, which multiplies all of them by the same number: undo it.
        total = math.hypot(*values)
        scale = grad_norm / total if grad_norm is not None and math.isfinite(grad_norm) and total > 0 else 1.0
        return {name: value * scale for name, value in zip(names, values, strict=True)}

    def sync(self, state: TrainerState) -> None:
        """Sum what each rank has counted, into the window and the counters of `state`. Every rank must call it."""
        if self._work is None or self._started is None:
            return
        self._synchronize()
        now = time.perf_counter()
        seconds = max(now - self._started - self._paused, 1e-9)
        counted = self._work.to(sum_dtype(self._work.device))
        own = counted.new_tensor([self._samples, seconds, self._waited, peak_memory(self.accelerator.device)])
        # [ranks, quantities + 4]
        ranks = self.accelerator.gather(torch.cat([counted, own]).unsqueeze(0)).cpu().double()
        sums, slowest = ranks[:, :-3].sum(dim=0), ranks[:, -3:].amax(dim=0)
        self._started, self._work, self._samples = now, None, 0
        self._waited = self._paused = 0.0
        self._sums, self._times, self._peak = self._sums + sums, self._times + slowest[:2], slowest[2].item()
        self.total_samples += sums[-1].item()
        self.advance(state, sums[:-1])

    def _synchronize(self) -> None:
        if self.accelerator.device.type != "cpu":
            torch.accelerator.synchronize(self.accelerator.device)


def gradient_norms(model: nn.Module, module_of: Callable[[str], str]) -> dict[str, Tensor]:
    """The 2-norm of the gradients of each module: 0-d tensors on the device, of all shards.

    Empty under DeepSpeed, which does not expose gradients.
    """
    gradients: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradients.setdefault(module_of(name.replace("_orig_mod.", "")), []).append(parameter.grad)
    norms = {module: get_total_norm(tensors) for module, tensors in gradients.items()}
    return {module: norm.full_tensor() if hasattr(norm, "full_tensor") else norm for module, norm in norms.items()}


def peak_memory(device: torch.device) -> float:
    """Peak memory of this process in bytes: allocated on the device, or resident on a CPU."""
    if device.type == "mps":  # no peak is recorded
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
    """Whether Trainer's own callback logs this step (or may, at the end of an epoch)."""
    if args.logging_first_step and step == 1:
        return True
    if step >= state.max_steps:
        return args.logging_strategy != IntervalStrategy.NO
    if args.logging_strategy == IntervalStrategy.STEPS:
        return step % state.logging_steps == 0
    return args.logging_strategy == IntervalStrategy.EPOCH
