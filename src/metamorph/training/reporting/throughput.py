"""What the monitor counts of MetaMorph's own batches: tokens, images, FLOPs and the use of the device's peak."""

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
"""Dense bfloat16 peak of one device in 10¹² FLOP/s, from its data sheet, without sparsity; of the names that are words
of the device's own the first counts. float16 has the same peaks."""


class ThroughputMonitor(RunMonitor):
    """Measures a run of MetaMorph, see [`RunMonitor`].

    Args:
        flops: FLOPs of each unit of work of the model.
        num_image_tokens: Visual tokens of one image.
        peak_tflops: Peak of one device in 10¹² FLOP/s; None leaves `mfu` out.
    """

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
        """Samples in a batch of one of our collators; rows, if it does not say how long its samples are."""
        lengths = batch.get("indices", {}).get("sample_lengths")
        return len(batch["input_ids"] if lengths is None else lengths)

    def advance(self, state: TrainerState, work: Tensor) -> None:
        """Advance `num_input_tokens_seen` and `total_flos`."""
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
