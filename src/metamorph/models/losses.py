"""The two losses of VPiT, each as a sum and a count: the caller decides what to average over.

Both take supervised positions only. The model gathers their hidden states first, because the logits of all positions
(batch · sequence · vocabulary in float32) are the largest tensor of a training step and mostly unused. An empty set of
positions gives a sum of exactly 0 that still reaches the head's parameters, so data-parallel ranks without such
positions stay in step with the others.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


SOFTMAX_TEMPERATURE = 0.07
"""Temperature of the soft cross-entropy, as in the original system."""


@dataclass(frozen=True)
class LossSum:
    """A loss before averaging."""

    sum: Tensor
    """0-d, float32."""
    count: Tensor
    """0-d, integer: the number of summed positions."""

    @classmethod
    def of(cls, total: Tensor, positions: Tensor) -> "LossSum":
        """Count the positions that `total` sums over: the first dimension of `positions`."""
        # Filled on the device: copying a number there would make the host wait.
        return cls(total, torch.full((), positions.shape[0], device=positions.device))


class LossNormalizers(NamedTuple):
    """Divisors of the summed losses, with `aux` for the load-balancing loss; None is the batch's own count."""

    text: Tensor | float | None = None
    visual: Tensor | float | None = None
    aux: Tensor | float | None = None


def text_loss(logits: Tensor, labels: Tensor) -> LossSum:
    """Cross-entropy of [positions, vocabulary] logits, already shifted: row i predicts `labels[i]`."""
    total = F.cross_entropy(logits.float(), labels, reduction="sum")
    return LossSum.of(total, labels)


def visual_loss(predictions: Tensor, targets: Tensor, *, normalize: bool, apply_softmax: bool) -> LossSum:
    """Distance between [positions, D] outputs of the vision head and visual tokens, into which no gradient flows.

    With `apply_softmax`: cross-entropy between the target, a distribution over features, and softmax(prediction / τ),
    τ = 0.07. Otherwise with `normalize`: 1 − cosine, the loss of the paper (arXiv 2412.14164) shifted so that 0 is
    perfect. Otherwise: the mean absolute error over the features.
    """
    predictions, targets = predictions.float(), targets.detach().float()
    if normalize:
        predictions = F.normalize(predictions, dim=-1)
    if apply_softmax:
        per_position = -(targets * torch.log_softmax(predictions / SOFTMAX_TEMPERATURE, dim=-1)).sum(dim=-1)
    elif normalize:
        per_position = 1 - (predictions * targets).sum(dim=-1)
    else:
        per_position = (predictions - targets).abs().mean(dim=-1)
    return LossSum.of(per_position.sum(), per_position)


def cosine_sum(predictions: Tensor, targets: Tensor) -> Tensor:
    """Sum over positions of cos(prediction, target), 0-d, without gradient."""
    return F.cosine_similarity(predictions.detach().float(), targets.detach().float(), dim=-1).sum()


def direction_sums(targets: Tensor, places: Tensor, num_places: int) -> Tensor:
    """Sum of target / |target| at each position in the image, [N, D] float32, without gradient.

    The best constant prediction for a position, by mean cosine, has the direction of its sum s and a mean cosine of |s|
    / (number of targets). These sums are all that the constant baseline of the cosine needs. `targets` are [targets,
    D], and `places` their positions in their images.
    """
    directions = F.normalize(targets.detach().float(), dim=-1)
    return directions.new_zeros(num_places, directions.shape[-1]).index_add_(0, places, directions)


def average(loss: LossSum, normalizer: Tensor | float | None) -> Tensor:
    """Divide a sum by `normalizer`, or by its own count. An empty sum divided by 0 stays exactly 0.

    A normalizer may lie between 0 and 1: data parallelism divides the count of the step by the number of ranks.
    """
    divisor = torch.as_tensor(loss.count if normalizer is None else normalizer, device=loss.sum.device)
    return loss.sum / (divisor + (divisor == 0))


def sum_dtype(device: torch.device) -> torch.dtype:
    """Dtype of sums over many batches: float64, which Apple's GPUs lack."""
    return torch.float32 if device.type == "mps" else torch.float64


def constant_cosine_sum(direction_sums: Tensor) -> Tensor:
    """Summed cosine of the best constant prediction, 0-d, from [N, D] `direction_sums` of all targets."""
    return direction_sums.norm(dim=-1).sum()
