"""Collators: examples of different lengths as one batch, padded on the right or several per row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from metamorph.models.batch_indices import index_batch
from metamorph.models.sequence.constants import IGNORE_INDEX


_PER_TOKEN = ("input_ids", "labels", "visual_target_mask")


@dataclass(frozen=True)
class PaddedCollator:
    """Pads examples of a [`ConversationDataset`] to the longest of the batch.

    The attention mask is made from lengths, so the pad token may occur inside samples.
    """

    pad_token_id: int
    """Id to pad with; any id will do, see `MetaMorphProcessor.pad_token_id`."""
    image_token_id: int | None = None
    """Id of the image placeholder. If given, the batch includes its `indices`, which a GPU then need not search for."""

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Make a batch.

        Args:
            examples: Examples of the data set; skipped ones are left out. If none is left, the batch is one row of
                one padding token without any target, so that all ranks still take the same number of steps.

        Returns:
            `input_ids`, `attention_mask`, `labels` (int64) and `visual_target_mask` (bool) `[batch, sequence]`;
            `pixel_values` float32 `[images, 3, height, width]` of all rows in reading order, only if there are
            images; with `image_token_id` also `indices`, see `BatchIndices`.
        """
        kept = _without_skipped(examples)
        batch = _empty_batch(len(kept), max((len(example["input_ids"]) for example in kept), default=1), self)
        batch["attention_mask"] = torch.zeros_like(batch["input_ids"])
        if not kept:
            batch["attention_mask"][0, 0] = 1  # a row that attends to nothing would be undefined
        for row, example in enumerate(kept):
            count = len(example["input_ids"])
            batch["attention_mask"][row, :count] = 1
            for name in _PER_TOKEN:
                batch[name][row, :count] = example[name]
        return batch | _indices(batch, kept, self, batch["attention_mask"]) | _pixels(kept)


@dataclass(frozen=True)
class PackedCollator:
    """Joins the examples of each row of a [`BatchPlan`], and pads rows to the longest of the batch.

    `position_ids` restart at every sample, and there is no attention mask. From this Transformers infers that rows are
    packed, and keeps samples apart (SDPA, eager and flex attention). Its flash attention can infer the boundaries of a
    single row only, so with `flash_attention` the batch includes them, see [`flash_attention_boundaries`].
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
        lengths = [[len(example["input_ids"]) for example in examples] for examples in kept]
        length = max(map(sum, lengths), default=1)
        batch = _empty_batch(len(kept), length, self)
        batch["position_ids"] = torch.zeros_like(batch["input_ids"])
        for row, examples in enumerate(kept):
            for name in _PER_TOKEN:
                joined = torch.cat([example[name] for example in examples])
                batch[name][row, : len(joined)] = joined
            spans = [*lengths[row], length - sum(lengths[row])]
            batch["position_ids"][row] = torch.cat([torch.arange(span) for span in spans])
        is_start = batch["position_ids"] == 0
        # The last token of one sample must not learn to predict the first of the next.
        batch["labels"][is_start] = IGNORE_INDEX
        if batch["visual_target_mask"][is_start].any():
            raise ValueError("a sample begins with an image to draw, which nothing precedes: put text before it")
        if self.flash_attention:
            batch |= flash_attention_boundaries(batch["position_ids"])
        tokens = torch.arange(length) < torch.tensor([max(sum(row), 1) for row in lengths or [[1]]])[:, None]
        joined_rows = [example for examples in kept for example in examples]
        return batch | _indices(batch, joined_rows, self, tokens) | _pixels(joined_rows)


def flash_attention_boundaries(position_ids: torch.Tensor) -> dict[str, Any]:
    """Boundaries of the samples as Transformers' `FlashAttentionKwargs`.

    Args:
        position_ids: int64 `[rows, sequence]`, 0 at the beginning of each sample and nowhere else.
    """
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


def _empty_batch(num_rows: int, length: int, collator: PaddedCollator | PackedCollator) -> dict[str, Any]:
    shape = (max(num_rows, 1), length)
    return {
        "input_ids": torch.full(shape, collator.pad_token_id, dtype=torch.long),
        "labels": torch.full(shape, IGNORE_INDEX, dtype=torch.long),
        "visual_target_mask": torch.zeros(shape, dtype=torch.bool),
    }


def _indices(
    batch: dict[str, Any],
    examples: Sequence[dict[str, Any]],
    collator: PaddedCollator | PackedCollator,
    is_token: torch.Tensor,
) -> dict[str, Any]:
    """Positions of images, targets and tokens, which are cheap to find here, on the CPU."""
    if collator.image_token_id is None:
        return {}
    indices = index_batch(batch["input_ids"], batch["labels"], batch["visual_target_mask"], collator.image_token_id)
    indices["sample_lengths"] = torch.tensor([len(example["input_ids"]) for example in examples], dtype=torch.long)
    indices["tokens"] = is_token.flatten().nonzero().squeeze(-1)
    return {"indices": indices}


def _pixels(examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """The images of all examples in reading order, as pixels or (from a feature cache) as visual tokens."""
    names = ("pixel_values", "visual_tokens")
    found = {name: [example[name] for example in examples if example.get(name) is not None] for name in names}
    return {name: torch.cat(images) for name, images in found.items() if images}
