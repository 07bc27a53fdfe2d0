"""Typed outputs of the models, with shapes.

Shape legend: B batch, S sequence, V vocabulary, I images in the batch, N visual tokens per image, D features of one
visual token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import ModelOutput

from .losses import sum_dtype


@dataclass
class MetaMorphModelOutput(BaseModelOutputWithPast):
    """Output of [`MetaMorphModel`]."""

    visual_tokens: Tensor | None = None
    """[I, N, D]; None in a batch without images."""
    router_logits: tuple[Tensor, ...] | None = None
    """[B · S, experts] of each layer with experts, with `output_router_logits`."""


@dataclass
class MetaMorphOutput(ModelOutput):
    """Output of [`MetaMorphForConditionalGeneration`]. The loss fields are 0-d tensors, None without `labels`."""

    loss: Tensor | None = None
    """`text_loss + vision_coef · visual_loss` with `use_vision_ar`, else `text_loss`; and `router_aux_loss_coef ·
    aux_loss` where experts are balanced."""
    text_loss: Tensor | None = None
    """Cross-entropy per supervised text token."""
    visual_loss: Tensor | None = None
    """Visual loss per target token; None without `use_vision_ar`."""
    aux_loss: Tensor | None = None
    """Load-balancing loss of a mixture of experts, see `docs/model.md`; None without one."""
    num_tokens: Tensor | None = None
    """Tokens that `aux_loss` is a mean over; None without it."""
    num_text_tokens: Tensor | None = None
    """Supervised text tokens in this batch."""
    num_visual_tokens: Tensor | None = None
    """Visual target tokens in this batch."""
    visual_cosine: Tensor | None = None
    """Mean cos(prediction, target) over this batch's visual targets, without gradient; 0 if there are none."""
    visual_direction_sums: Tensor | None = None
    """[N, D] sum of this batch's normalised visual targets at each position in the image, without gradient; gives the
    best constant prediction. None without `use_vision_ar`."""
    num_image_starts: Tensor | None = None
    """How many of the positions `indices["image_starts"]` predict `<image_start>`."""
    logits: Tensor | None = None
    """[B, S or logits_to_keep, V]; None in training, see `logits_to_keep`."""
    visual_prediction: Tensor | None = None
    """[B, 1, D] the next visual token, predicted at the last position (generation)."""
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    text_loss_sum: Tensor | None = None
    """The losses and the cosine of this batch before they are divided, without gradient."""
    visual_loss_sum: Tensor | None = None
    visual_cosine_sum: Tensor | None = None
    aux_loss_sum: Tensor | None = None


def stack_fields(outputs: MetaMorphOutput, names: Sequence[str]) -> Tensor:
    """0-d fields of an output in one tensor on the device, 0 where None, in the dtype of sums over many batches."""
    if outputs.text_loss_sum is None:
        raise ValueError("the model returned no losses: the batch has no labels")
    zero = torch.zeros_like(outputs.text_loss_sum, dtype=sum_dtype(outputs.text_loss_sum.device))
    values = (getattr(outputs, name) for name in names)
    return torch.stack([zero if value is None else value.to(zero) for value in values])
