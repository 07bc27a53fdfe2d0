"""What a run of the visualizer's trainer tells in each log entry: loss, rate, gradient, speed and waiting."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator


class RunMonitor:
    """Collects the values of optimizer steps and makes log entries of them.

    Args:
        accelerator: Takes means over the processes.
        samples_per_step: Pictures of an optimizer step, over all processes.
    """

    def __init__(self, accelerator: Accelerator, samples_per_step: int) -> None:
        self.accelerator = accelerator
        self.samples_per_step = samples_per_step
        self._sums: list[torch.Tensor] = []
        self._logged = 0
        self._norm: torch.Tensor | None = None
        self._waited = self._paused = 0.0
        self._began = self._window = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Since the run began."""
        return time.perf_counter() - self._began

    def fetch(self, batches: Iterator[dict[str, Any]]) -> dict[str, Any]:
        """The next batch; the time that it takes is waiting for data."""
        began = time.perf_counter()
        batch = next(batches)
        self._waited += time.perf_counter() - began
        return batch

    @contextmanager
    def pause(self) -> Iterator[None]:
        """What is done within is no training."""
        began = time.perf_counter()
        yield
        self._paused += time.perf_counter() - began

    def add(self, sums: torch.Tensor, grad_norm: torch.Tensor | None) -> None:
        """Take the values of an optimizer step, on the device.

        Args:
            sums: `[2]`: losses of the step and number of good pictures, both divided by the number of pictures.
            grad_norm: Length of the gradient before clipping.
        """
        self._sums.append(sums)
        self._norm = grad_norm

    def entry(self, lr: float) -> dict[str, float]:
        """The values of a log entry; what happened since the last one. For all processes.

        Args:
            lr: Learning rate of the projector.
        """
        steps = len(self._sums) - self._logged
        loss, share = self.accelerator.reduce(torch.stack(self._sums[self._logged :]).mean(dim=0), "mean").tolist()
        self._logged = len(self._sums)
        now = time.perf_counter()  # behind the reading of the loss, which waits for the device
        seconds = max(now - self._window - self._paused, 1e-9)
        values = {
            "loss": _ratio(loss, share),
            "lr": lr,
            "samples_per_second": steps * self.samples_per_step / seconds,
            "data_wait": self._waited / seconds,
        }
        if self._norm is not None:
            values["grad_norm"] = float(self._norm)
        self._window, self._waited, self._paused = now, 0.0, 0.0
        return values

    def losses(self) -> list[float]:
        """Mean loss of each step over all processes. For all processes."""
        if not self._sums:
            return []
        return [_ratio(*sums) for sums in self.accelerator.reduce(torch.stack(self._sums), "mean").tolist()]


def _ratio(loss: float, share: float) -> float:
    return loss / share if share else 0.0
