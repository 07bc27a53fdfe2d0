"""The two losses of VPiT, each as a sum and a count, so that the caller decides over what they are averaged.

Both take only the positions that are supervised: the model gathers hidden states first, because logits of all
positions (batch · sequence · vocabulary in float32) are the largest tensor of a training step and mostly unused.
An empty set of positions gives a sum of exactly 0 that still reaches the head's parameters, so that data-parallel
ranks without any such position stay aligned with the others.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


SOFTMAX_TEMPERATURE = 0.07
"""Temperature of the soft cross-entropy, as in the original system."""


@dataclass(frozen=True)
class LossSum:
    """A loss that is not yet averaged."""

    sum: Tensor
    """0-d float32 tensor."""
    count: Tensor
    """0-d integer tensor: the number of summed positions."""

    @classmethod
    def of(cls, total: Tensor, positions: Tensor) -> "LossSum":
        """A sum over `positions` [positions, ...]."""
        # Filled on the device: a number copied there would make the host wait.
        return cls(total, torch.full((), positions.shape[0], device=positions.device))


def text_loss(logits: Tensor, labels: Tensor) -> LossSum:
    """Cross-entropy of next-token prediction.

    Args:
        logits: [positions, vocabulary], already shifted: row i predicts `labels[i]`.
        labels: [positions], every one a token id.
    """
    total = F.cross_entropy(logits.float(), labels, reduction="sum")
    return LossSum.of(total, labels)


def visual_loss(predictions: Tensor, targets: Tensor, *, normalize: bool, apply_softmax: bool) -> LossSum:
    """Distance between predicted and true visual tokens.

    With `apply_softmax`: cross-entropy between the target, which is a distribution over features, and
    softmax(prediction / τ), τ = 0.07. Otherwise with `normalize`: 1 − cosine, the loss of the paper (arXiv 2412.14164)
    shifted so that 0 is perfect. Otherwise: the mean absolute error over the features.

    Args:
        predictions: [positions, D] output of the vision head, not normalised.
        targets: [positions, D] visual tokens; no gradient flows into them.
        normalize: divide predictions by their L2 norm first (`normalize_vision`).
        apply_softmax: whether visual tokens are distributions in this model.
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
    """Sum over positions of cos(prediction, target), a 0-d tensor without gradient, for the log."""
    return F.cosine_similarity(predictions.detach().float(), targets.detach().float(), dim=-1).sum()


def direction_sums(targets: Tensor, places: Tensor, num_places: int) -> Tensor:
    """Sum over positions of target / |target| for each place in the image, without gradient.

    The constant that comes closest to the targets of a place by their mean cosine has the direction of this sum s, and
    its mean cosine is |s| / (number of targets). So these sums are all that the baseline of a cosine needs.

    Args:
        targets: [positions, D] visual tokens.
        places: int64 [positions], which of the visual tokens of its image each one is.
        num_places: Visual tokens of one image.

    Returns:
        float32 [num_places, D].
    """
    directions = F.normalize(targets.detach().float(), dim=-1)
    return directions.new_zeros(num_places, directions.shape[-1]).index_add_(0, places, directions)


def average(loss: LossSum, normalizer: Tensor | float | None) -> Tensor:
    """Divides a sum by `normalizer`, or by its own count; an empty sum divided by a count of 0 stays exactly 0.

    A normalizer may lie between 0 and 1: data parallelism divides the count of the step by the number of ranks.
    """
    divisor = torch.as_tensor(loss.count if normalizer is None else normalizer, device=loss.sum.device)
    return loss.sum / (divisor + (divisor == 0))


def sum_dtype(device: torch.device) -> torch.dtype:
    """What sums over many batches are kept in: float64, except on Apple's GPUs, which do not have it.

    Args:
        device: Where they are kept.
    """
    return torch.float32 if device.type == "mps" else torch.float64


def constant_cosine_sum(direction_sums: Tensor) -> Tensor:
    """Summed cosine of the best constant prediction for each place in the image, a 0-d tensor.

    Args:
        direction_sums: [N, D] of all visual targets, see `direction_sums`.
    """
    return direction_sums.norm(dim=-1).sum()
