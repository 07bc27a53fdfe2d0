"""Collators: examples of different lengths as one batch, padded on the right or several per row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from metamorph.models.batch_indices import index_batch
from metamorph.models.sequence.constants import IGNORE_INDEX


@dataclass(frozen=True)
class PaddedCollator:
    """Pads examples of a [`ConversationDataset`] to the longest of the batch.

    What is padding follows from lengths, so the pad token may occur inside samples.
    """

    pad_token_id: int
    """Id to pad with; any id will do, see `MetaMorphProcessor.pad_token_id`."""
    image_token_id: int | None = None
    """Id of the image placeholder. If given, the batch includes its `indices`, which a GPU then need not search for,
    instead of the attention mask: causal attention never looks at padding on the right, and is faster without."""

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Make a batch of all examples but the skipped ones.

        If none is left, the batch is one row of one padding token without any target, so that all ranks still take the
        same number of steps.

        Returns:
            `input_ids`, `labels` (int64) and `visual_target_mask` (bool) `[batch, sequence]`; `attention_mask` (int64)
            of that shape or, with `image_token_id`, `indices`, see `BatchIndices`; `pixel_values` float32
            `[images, 3, height, width]` of all rows in reading order, only if there are images.
        """
        kept = _without_skipped(examples)
        batch, is_token = _pad([[example] for example in kept], self.pad_token_id)
        indices = _indices(batch, kept, self.image_token_id, is_token)
        return batch | (indices or {"attention_mask": is_token.long()}) | _pixels(kept)


@dataclass(frozen=True)
class PackedCollator:
    """Joins the examples of each row of a [`BatchPlan`], and pads rows to the longest of the batch.

    `position_ids` restart at every sample, and there is no attention mask: the model makes one from `indices`, and
    without them Transformers infers from positions that rows are packed. Its flash attention can infer the boundaries
    of a single row only, so with `flash_attention` the batch includes them, see [`flash_attention_boundaries`].
    """

    pad_token_id: int
    flash_attention: bool = False
    image_token_id: int | None = None
    """As for [`PaddedCollator`]."""

    def __call__(self, rows: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
        """Make a batch from the examples of each row; see [`PaddedCollator`] for skipped ones.

        Returns:
            The same as [`PaddedCollator`], but with `position_ids` int64 `[rows, sequence]` instead of the attention
            mask. The padding of a row counts as one more sample, without targets.

        Raises:
            ValueError: If a sample begins with an image to draw: nothing precedes it that could predict it.
        """
        kept = [examples for row in rows if (examples := _without_skipped(row))]
        batch, is_token = _pad(kept, self.pad_token_id)
        spans = []
        for examples in kept or [[]]:
            lengths = [len(example["input_ids"]) for example in examples]
            padding = is_token.shape[1] - sum(lengths)
            spans.append([*lengths, padding] if padding else lengths)
        batch["position_ids"] = torch.stack([torch.cat([torch.arange(span) for span in row]) for row in spans])
        is_start = batch["position_ids"] == 0
        # The last token of one sample must not learn to predict the first of the next.
        batch["labels"][is_start] = IGNORE_INDEX
        if batch["visual_target_mask"][is_start].any():
            raise ValueError("a sample begins with an image to draw, which nothing precedes: put text before it")
        if self.flash_attention:
            batch |= flash_attention_boundaries(batch["position_ids"])
        joined = [example for examples in kept for example in examples]
        indices = _indices(batch, joined, self.image_token_id, is_token)
        if indices:
            indices["indices"]["spans"] = spans
        return batch | indices | _pixels(joined)


def flash_attention_boundaries(position_ids: torch.Tensor) -> dict[str, Any]:
    """Boundaries of samples, whose `position_ids` (int64 `[rows, sequence]`) begin at 0, as `FlashAttentionKwargs`."""
    starts = (position_ids.flatten() == 0).nonzero().squeeze(-1)  # in the flattened batch
    boundaries = torch.cat([starts, starts.new_tensor([position_ids.numel()])]).to(torch.int32)  # (samples + 1,)
    longest = int(boundaries.diff().max())
    return {
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def _without_skipped(examples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [example for example in examples if "skipped" not in example]


def _pad(rows: Sequence[Sequence[dict[str, Any]]], pad_token_id: int) -> tuple[dict[str, Any], torch.Tensor]:
    """Rows padded to the longest, one token long if there are none; and which positions are tokens."""
    lengths = [sum(len(example["input_ids"]) for example in row) for row in rows] or [1]
    is_token = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]  # (rows, sequence)
    batch = {
        "input_ids": torch.full(is_token.shape, pad_token_id),
        "labels": torch.full(is_token.shape, IGNORE_INDEX),
        "visual_target_mask": torch.zeros_like(is_token),
    }
    for name, values in batch.items() if rows else ():
        values[is_token] = torch.cat([example[name] for row in rows for example in row])
    return batch, is_token


def _indices(
    batch: dict[str, Any], examples: Sequence[dict[str, Any]], image_token_id: int | None, is_token: torch.Tensor
) -> dict[str, Any]:
    """Positions of images, targets and tokens, which are cheap to find here, on the CPU."""
    if image_token_id is None:
        return {}
    indices = index_batch(batch["input_ids"], batch["labels"], batch["visual_target_mask"], image_token_id)
    indices["sample_lengths"] = torch.tensor([len(example["input_ids"]) for example in examples], dtype=torch.long)
    indices["tokens"] = is_token.flatten().nonzero().squeeze(-1)
    return {"indices": indices}


def _pixels(examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """The images of all examples in reading order, as pixels or (from a feature cache) as visual tokens."""
    names = ("pixel_values", "visual_tokens")
    found = {name: [example[name] for example in examples if example.get(name) is not None] for name in names}
    return {name: torch.cat(images) for name, images in found.items() if images}
