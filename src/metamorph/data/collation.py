"""Examples of different lengths as one batch, padded on the right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from metamorph.models.constants import IGNORE_INDEX


@dataclass(frozen=True)
class PaddedCollator:
    """Pads examples of a [`ConversationDataset`] to the longest of the batch.

    The attention mask is made from lengths, so the pad token may well occur inside samples.
    """

    pad_token_id: int
    """Id to pad with; any id will do, see `MetaMorphProcessor.pad_token_id`."""

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Make a batch.

        Args:
            examples: Examples of the data set; skipped ones are left out. If none is left, the batch is one row of
                one padding token without any target, so that all processes still take the same number of steps.

        Returns:
            `input_ids`, `attention_mask`, `labels` (int64) and `visual_target_mask` (bool) `[batch, sequence]`;
            `pixel_values` float32 `[images, 3, height, width]` of all rows in reading order, only if there are
            images.
        """
        kept = [example for example in examples if "skipped" not in example]
        length = max((len(example["input_ids"]) for example in kept), default=1)
        shape = (max(len(kept), 1), length)
        batch: dict[str, Any] = {
            "input_ids": torch.full(shape, self.pad_token_id, dtype=torch.long),
            "attention_mask": torch.zeros(shape, dtype=torch.long),
            "labels": torch.full(shape, IGNORE_INDEX, dtype=torch.long),
            "visual_target_mask": torch.zeros(shape, dtype=torch.bool),
        }
        if not kept:
            batch["attention_mask"][0, 0] = 1  # a row that attends to nothing would be undefined
        for row, example in enumerate(kept):
            count = len(example["input_ids"])
            batch["attention_mask"][row, :count] = 1
            for name in ("input_ids", "labels", "visual_target_mask"):
                batch[name][row, :count] = example[name]
        pixels = [example["pixel_values"] for example in kept if example.get("pixel_values") is not None]
        if pixels:
            batch["pixel_values"] = torch.cat(pixels)
        return batch
