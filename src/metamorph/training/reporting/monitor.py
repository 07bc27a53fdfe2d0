"""What a training run reports in each log line: speed, waiting, memory and gradients, over all ranks.

Between two log lines nothing is read back from the device: work is summed there, time is taken on the host. The one
exception is a pause (evaluation, samples, a checkpoint), before which the device is waited for, so that its time is
not counted as training.
"""

from __future__ import annotations

import logging
import math
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from transformers import IntervalStrategy, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from metamorph.models.losses import sum_dtype
from metamorph.training.costs.flops import ModelFlops, Work, count_work
from metamorph.training.optimizer import module_of


logger = logging.getLogger(__name__)

PEAK_TFLOPS = {
    "B200": 2250.0,
    "GH200": 989.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "A40": 150.0,
    "A10": 125.0,
    "MI300X": 1307.0,
}
"""Dense bfloat16 peak of one device in 10¹² FLOP/s, from its data sheet, without sparsity; of the names that are words
of the device's own the first counts. float16 has the same peaks."""


@dataclass
class Window:
    """What happened since the last log line, over all ranks."""

    work: Tensor
    """float64 [6] on the CPU: the sums of the fields of `Work`."""
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

    The trainer fetches its batches through `fetch`, asks `drain` for the values of a log line, and wraps in `pause`
    what is no training.

    Args:
        accelerator: Gathers over the ranks.
        flops: FLOPs of each unit of work of the model.
        num_image_tokens: Visual tokens of one image.
        peak_tflops: Peak of one device in 10¹² FLOP/s; None leaves `mfu` out.
    """

    def __init__(
        self, accelerator: Accelerator, flops: ModelFlops, num_image_tokens: int, peak_tflops: float | None
    ) -> None:
        self.accelerator = accelerator
        self.flops = flops
        self.num_image_tokens = num_image_tokens
        self.peak_tflops = peak_tflops
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

    def fetch(self, batches: Iterator[dict[str, Any]], count: int) -> list[dict[str, Any]]:
        """Take the micro-batches of one optimizer step, and count what is in them.

        Args:
            batches: Yields micro-batches.
            count: How many to take; fewer if there are no more.
        """
        began = time.perf_counter()
        if self._started is None:
            self._started = began
        taken = list(islice(batches, count))
        self._waited += time.perf_counter() - began
        if taken:
            self._steps += 1
        for batch in taken:
            work = count_work(batch, self.num_image_tokens)
            self._work = work if self._work is None else self._work + work
            self._samples += num_samples(batch)
        return taken

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
            state: `num_input_tokens_seen` is advanced.
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
        work, seconds = Work(*window.work.tolist()), window.seconds
        flops = self.flops.total(work)
        devices = self.accelerator.num_processes
        logs |= {
            "step_seconds": seconds / steps,
            "data_wait_share": window.waited / seconds,
            "tokens_per_second": work.tokens / seconds,
            "samples_per_second": window.samples / seconds,
            "images_per_second": work.visual_tokens / self.num_image_tokens / seconds,
            "model_tflops_per_device": flops / seconds / devices / 1e12,
            "peak_memory_gib": window.peak / 2**30,
            "skipped_records": self.skipped_records(),
            "tokens_seen": state.num_input_tokens_seen,
        }
        if self.peak_tflops is not None:
            logs["mfu"] = logs["model_tflops_per_device"] / self.peak_tflops
        return logs

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
            self._norms = gradient_norms(model)

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

        A checkpoint needs it, too: `tokens_seen` shall go on from there.

        Args:
            state: `num_input_tokens_seen` and `total_flos` are advanced.
        """
        if self._work is None or self._started is None:
            return
        self._synchronize()
        now = time.perf_counter()
        seconds = max(now - self._started - self._paused, 1e-9)
        counted = self._work.to(sum_dtype(self._work.device))
        own = counted.new_tensor([self._samples, seconds, self._waited, peak_memory(self.accelerator.device)])
        ranks = self.accelerator.gather(torch.cat([counted, own]).unsqueeze(0)).cpu().double()  # [ranks, 6 + 4]
        work, samples = ranks[:, :6].sum(dim=0), ranks[:, 6].sum().item()
        seconds, waited, peak = ranks[:, 7:].max(dim=0).values.tolist()
        self._clear()
        self._started = now
        self.total_samples += samples
        state.num_input_tokens_seen += round(work[0].item())
        state.total_flos += self.flops.total(Work(*work.tolist()))
        before = self._window
        if before is not None:
            work, samples = work + before.work, samples + before.samples
            seconds, waited = seconds + before.seconds, waited + before.waited
        self._window = Window(work, samples, seconds, waited, peak)

    def _synchronize(self) -> None:
        if self.accelerator.device.type != "cpu":
            torch.accelerator.synchronize(self.accelerator.device)


def num_samples(batch: dict[str, Any]) -> int:
    """Samples in a batch of one of our collators; rows, if it does not say how long its samples are.

    Args:
        batch: The batch.
    """
    lengths = batch.get("indices", {}).get("sample_lengths")
    return len(batch["input_ids"] if lengths is None else lengths)


def gradient_norms(model: nn.Module) -> dict[str, Tensor]:
    """The 2-norm of the gradients of each module, 0-d tensors on the device; sharded gradients are joined.

    Empty under DeepSpeed, which keeps gradients to itself.

    Args:
        model: With gradients.
    """
    gradients: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradients.setdefault(module_of(name.replace("_orig_mod.", "")), []).append(parameter.grad)
    norms = {module: get_total_norm(tensors) for module, tensors in gradients.items()}
    return {module: norm.full_tensor() if hasattr(norm, "full_tensor") else norm for module, norm in norms.items()}


def find_peak_tflops(given: float | None, *, half_precision: bool, device: torch.device) -> float | None:
    """Peak of one device in 10¹² FLOP/s, for MFU.

    Args:
        given: `--peak_tflops`, which counts before the table.
        half_precision: Whether the run computes in bfloat16 or float16; the table has no other peaks.
        device: Of this process.

    Returns:
        None where it is not known: `mfu` is then not logged.
    """
    if given is not None or device.type != "cuda" or not half_precision:
        return given
    name = torch.cuda.get_device_name(device)
    peak = next((peak for part, peak in PEAK_TFLOPS.items() if re.search(rf"\b{part}\b", name)), None)
    if peak is None:
        logger.warning("the peak of %s is not known, so mfu is not logged: give it by --peak_tflops", name)
    return peak


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
    if args.logging_strategy == IntervalStrategy.STEPS:
        return step % state.logging_steps == 0
    return args.logging_strategy == IntervalStrategy.EPOCH
