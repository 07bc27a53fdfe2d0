"""Index tensors for a batch: where its images, supervised tokens and visual targets are.

Searching for them on a GPU makes the host wait for the device, because the number of matches is the shape of what
follows. The collators search on the CPU and add the indices to the batch; the model does it only for batches without.
"""

from typing import TypedDict

import torch
from torch import Tensor

from metamorph.models.sequence.constants import IGNORE_INDEX


class BatchIndices(TypedDict, total=False):
    """Positions in a batch [B, S] flattened to [B · S], and the values at them; all int64."""

    images: Tensor
    """[placeholders] positions of the visual tokens, in reading order."""
    text: Tensor
    """[text targets] positions whose hidden state predicts a supervised token: the one before each."""
    text_labels: Tensor
    """[text targets] the tokens to predict."""
    visual: Tensor
    """[visual targets] positions whose hidden state predicts a visual token: the one before each."""
    visual_targets: Tensor
    """[visual targets] which placeholder each of them predicts, as an index into `images`."""
    image_starts: Tensor
    """[answers with an image] positions whose hidden state predicts the first `<image_start>` of an answer; only in
    validation, see [`first_image_starts`]."""
    sample_lengths: Tensor
    """[samples] number of tokens of each sample; only from the collators."""
    tokens: Tensor
    """[tokens] positions that are not padding, at least one; only from the collators."""
    spans: list[list[int]]
    """Lengths of the samples of each packed row, and of its padding, on the host; only from the collator."""


def index_batch(
    input_ids: Tensor | None, labels: Tensor, visual_target_mask: Tensor | None, image_token_id: int
) -> BatchIndices:
    """Search a batch [B, S] for images, supervised tokens and visual targets.

    `input_ids` are None for text given as embeddings, and `labels` are not shifted. `visual_target_mask` must select
    placeholders only, and not the first position of a row, which no hidden state predicts.
    """
    none = torch.zeros(0, dtype=torch.long, device=labels.device)
    images = none if input_ids is None else (input_ids == image_token_id).flatten().nonzero().squeeze(-1)
    text = _predicted(labels != IGNORE_INDEX)
    indices = BatchIndices(images=images, text=text - 1, text_labels=labels.flatten()[text])
    if visual_target_mask is None:
        return indices | BatchIndices(visual=none, visual_targets=none)
    visual = _predicted(visual_target_mask)
    targets = visual_target_mask.flatten()[images].nonzero().squeeze(-1)
    if not torch.equal(images[targets], visual):
        raise ValueError(
            f"visual_target_mask selects {len(visual)} predictable positions, but {len(targets)} of them are "
            "placeholders of images (the first position of a row cannot be a target)"
        )
    return indices | BatchIndices(visual=visual - 1, visual_targets=targets)


def first_image_starts(labels: Tensor, visual_target_mask: Tensor, image_start_token_id: int) -> Tensor:
    """Flat positions [answers with an image] before the first `<image_start>` of each answer that has one.

    `labels` and `visual_target_mask` are as for [`index_batch`]; placeholders have no labels, but do not end an answer.
    """
    in_answer = (labels != IGNORE_INDEX) | visual_target_mask  # (batch, seq)
    begins = in_answer.clone()
    begins[:, 1:] &= ~in_answer[:, :-1]
    starts = _predicted(labels == image_start_token_id)
    answers = begins.flatten().cumsum(0)[starts]
    is_first = answers.diff(prepend=answers.new_zeros(1)) != 0  # answers count from 1
    return starts[is_first] - 1


def _predicted(mask: Tensor) -> Tensor:
    """Flat positions where `mask` [B, S] is set, except the first of each row."""
    mask = mask.clone()
    mask[:, 0] = False
    return mask.flatten().nonzero().squeeze(-1)
