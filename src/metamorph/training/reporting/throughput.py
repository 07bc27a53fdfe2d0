"""Throughput of the model: tokens, images and FLOPs per second, and the fraction of the device's peak (MFU)."""

from __future__ import annotations

import logging
import re
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import TrainerState

from metamorph.training.costs.flops import ModelFlops, Work, count_work
from metamorph.training.optimizer import module_of
from metamorph.training.reporting.monitor import RunMonitor


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
"""Dense bfloat16 peak of a device in 10¹² FLOP/s, from its data sheet; float16 has the same. The first entry whose name
occurs as a word in the device's name applies."""


class ThroughputMonitor(RunMonitor):
    """[`RunMonitor`] of the model. Without `peak_tflops` (of one device, in 10¹² FLOP/s), `mfu` is not logged."""

    def __init__(
        self, accelerator: Accelerator, flops: ModelFlops, num_image_tokens: int, peak_tflops: float | None
    ) -> None:
        super().__init__(accelerator, module_of)
        self.flops = flops
        self.num_image_tokens = num_image_tokens
        self.peak_tflops = peak_tflops
        self._tokens_seen = 0

    def work_of(self, batch: dict[str, Any]) -> Tensor:
        """The fields of `Work`, `[6]`."""
        return count_work(batch, self.num_image_tokens)

    def samples_of(self, batch: dict[str, Any]) -> int:
        """Number of samples, or of rows if the batch has no sample lengths."""
        lengths = batch.get("indices", {}).get("sample_lengths")
        return len(batch["input_ids"] if lengths is None else lengths)

    def advance(self, state: TrainerState, work: Tensor) -> None:
        """Update `num_input_tokens_seen` and `total_flos`."""
        state.num_input_tokens_seen += round(work[0].item())
        state.total_flos += self.flops.total(Work(*work.tolist()))
        self._tokens_seen = state.num_input_tokens_seen

    def report(self, work: Tensor, seconds: float) -> dict[str, float]:
        """Tokens, images and FLOPs per second; see `docs/observability.md`."""
        window = Work(*work.tolist())
        logs = {
            "tokens_per_second": window.tokens / seconds,
            "images_per_second": window.visual_tokens / self.num_image_tokens / seconds,
            "model_tflops_per_device": self.flops.total(window) / seconds / self.accelerator.num_processes / 1e12,
            "tokens_seen": self._tokens_seen,
        }
        if self.peak_tflops is not None:
            logs["mfu"] = logs["model_tflops_per_device"] / self.peak_tflops
        return logs


def find_peak_tflops(given: float | None, *, half_precision: bool, device: torch.device) -> float | None:
    """Peak of one device in 10¹² FLOP/s: `given` by `--peak_tflops`, or from the table; None if it is not known."""
    if given is not None or device.type != "cuda" or not half_precision:
        return given
    name = torch.cuda.get_device_name(device)
    peak = next((peak for part, peak in PEAK_TFLOPS.items() if re.search(rf"\b{part}\b", name)), None)
    if peak is None:
        logger.warning("the peak of %s is not known, so mfu is not logged: set it with --peak_tflops", name)
    return peak
