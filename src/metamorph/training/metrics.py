"""Text and visual losses between two log entries, summed on the device, and those of validation."""

import time
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import TrainingArguments

from metamorph.data.dataset import MixtureDataset
from metamorph.evaluation.losses import evaluate_losses, total_loss
from metamorph.models.losses import constant_cosine_sum, sum_dtype
from metamorph.models.outputs import MetaMorphOutput, stack_fields
from metamorph.models.sequence.constants import IGNORE_INDEX


_FIELDS = (
    *("text_loss_sum", "visual_loss_sum", "visual_cosine_sum", "aux_loss_sum"),
    *("num_text_tokens", "num_visual_tokens", "num_tokens"),
)
"""What is summed over the outputs of the model."""


class LossWindow:
    """Sums of the losses since the last log entry, on the device: no synchronization until they are read."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None
        # Since this process started, not since the last entry: with few images the best constant fits each too well.
        self._direction_sums: Tensor | None = None
        self._targets_seen = 0.0

    def add(self, outputs: MetaMorphOutput) -> None:
        """Add one micro-batch."""
        window = stack_fields(outputs, _FIELDS)
        self._sums = window if self._sums is None else self._sums + window
        if outputs.visual_direction_sums is not None:
            directions = outputs.visual_direction_sums.to(dtype=sum_dtype(window.device))
            self._direction_sums = directions if self._direction_sums is None else self._direction_sums + directions

    def pop_metrics(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over all tokens of all ranks since the last call. Every rank must call it.

        `visual_cosine_baseline` is the cosine of the best constant prediction for each position in the image, over all
        visual targets since this process started.
        """
        if self._sums is None:
            return {}
        sums = accelerator.reduce(self._sums, reduction="sum")
        self._sums = None
        constant = sums.new_zeros(())
        if self._direction_sums is not None:
            constant = constant_cosine_sum(accelerator.reduce(self._direction_sums, reduction="sum")).to(sums.dtype)
        text, visual, cosine, aux, num_text, num_visual, num_tokens, constant_sum = torch.stack(
            [*sums, constant]
        ).tolist()
        self._targets_seen += num_visual
        logs = {"text_loss": text / max(num_text, 1), "num_text_tokens": num_text}
        if num_visual:
            logs |= {"visual_loss": visual / num_visual, "visual_cosine": cosine / num_visual}
            logs["visual_cosine_baseline"] = constant_sum / self._targets_seen
        if num_tokens:
            logs["aux_loss"] = aux / num_tokens
        return logs | {"num_visual_tokens": num_visual}


def count_tokens(batch: dict[str, Any]) -> Tensor:
    """The number of tokens in a batch, 0-d, without padding if `indices` or an `attention_mask` say which it is."""
    tokens = batch.get("indices", {}).get("tokens")
    if tokens is None and batch.get("attention_mask") is not None:
        return batch["attention_mask"].sum()
    labels = batch["labels"]
    return torch.full((), (labels if tokens is None else tokens).numel(), device=labels.device)


def count_targets(batch: dict[str, Any]) -> Tensor:
    """The numbers of supervised text tokens and of supervised visual tokens, `[2]`."""
    # Position 0 of a row is never predicted, so it does not count.
    text = (batch["labels"][:, 1:] != IGNORE_INDEX).sum()
    mask = batch.get("visual_target_mask")
    visual = torch.zeros_like(text) if mask is None else mask[:, 1:].sum()
    return torch.stack([text, visual])


def validation_metrics(
    model: nn.Module, dataset: MixtureDataset, accelerator: Accelerator, args: TrainingArguments, *, prefix: str
) -> dict[str, float]:
    """Validation losses of all sources, and of each if there are several. Every rank must call it."""
    began = time.perf_counter()
    losses = evaluate_losses(
        model,
        dataset,
        accelerator,
        batch_size=args.per_device_eval_batch_size,
        num_workers=args.dataloader_num_workers,
    )
    coefficient = accelerator.unwrap_model(model).config.vision_coef
    metrics = total_loss(losses).as_metrics(f"{prefix}_", coefficient)
    if len(losses) > 1:
        for source, loss in losses.items():
            metrics |= loss.as_metrics(f"{prefix}_{source}_", coefficient)
    return metrics | {f"{prefix}_runtime": round(time.perf_counter() - began, 3)}
