"""Classifier-free guidance: training drops whole conditions, drawing combines predictions with and without one.

`drop` is called by the denoiser in training, `GuidedBatch` by the pipeline. Both take zeros for "no condition".
"""

from __future__ import annotations

import torch


def drop(condition: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Replace the whole condition of an image by zeros where `keep` is False.

    Args:
        condition: `[images, tokens, features]`.
        keep: `[images]` bool, False for a share of `cfg_prob` of the images.
    """
    # Out of place: the projector's output belongs to the graph of its backward pass.
    return torch.where(keep[:, None, None], condition, torch.zeros_like(condition))


class GuidedBatch:
    """Pictures that are drawn at several guidance scales together: picture 1 at each scale, picture 2 at each, …

    The guided prediction is `zero + w · (condition − zero)`. Two things save work. A picture at scale 1 needs no
    unconditional half. And all scales of a picture start from the same noise, so in the first step one prediction
    with and one without the condition serve them all; afterwards their paths part.

    Args:
        condition: `[pictures, tokens, features]`.
        scales: One number or more.
    """

    def __init__(self, condition: torch.Tensor, scales: list[float]) -> None:
        self.num_scales = len(scales)
        pictures = condition.shape[0]
        weights = torch.tensor(scales, dtype=torch.float64).repeat(pictures)
        self._weights = weights.to(condition.device, torch.float32).view(-1, 1, 1, 1)
        self._guided = (weights != 1).nonzero().flatten().to(condition.device)
        self._condition = condition
        each = condition.repeat_interleave(self.num_scales, dim=0)
        # The unconditional rows first, then one conditional row for each picture and scale.
        self._rows = torch.cat([self._guided, torch.arange(len(weights), device=condition.device)])
        self._conditions = torch.cat([torch.zeros_like(each[self._guided]), each])

    @property
    def is_guided(self) -> bool:
        """Whether any picture needs an unconditional prediction."""
        return len(self._guided) > 0

    def start(self, latents: torch.Tensor) -> torch.Tensor:
        """Repeat starting noise `[pictures, …]` for every scale: `[pictures · scales, …]`."""
        return latents.repeat_interleave(self.num_scales, dim=0)

    def inputs(self, noisy: torch.Tensor, is_first: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """What the UNet is given in a step.

        Args:
            noisy: `[pictures · scales, channels, height, width]`.
            is_first: Whether this is the step in which all scales of a picture are still the same.

        Returns:
            Latents and conditions, one row for each prediction that is needed.
        """
        if is_first and self._shares_first:
            noisy = noisy[:: self.num_scales]
            zero = torch.zeros_like(self._condition)
            return torch.cat([noisy, noisy]), torch.cat([zero, self._condition])
        return noisy[self._rows] if self.is_guided else noisy, self._conditions

    def combine(self, prediction: torch.Tensor, is_first: bool) -> torch.Tensor:
        """From the UNet's predictions for `inputs` to the guided one, `[pictures · scales, …]`."""
        if is_first and self._shares_first:
            zero, conditional = (half.repeat_interleave(self.num_scales, dim=0) for half in prediction.chunk(2))
            return self._guide(zero, conditional, self._weights)
        if not self.is_guided:
            return prediction
        zero, conditional = prediction[: len(self._guided)], prediction[len(self._guided) :]
        if len(zero) == len(conditional):
            return self._guide(zero, conditional, self._weights)
        guided = self._guide(zero, conditional[self._guided], self._weights[self._guided])
        return conditional.index_copy(0, self._guided, guided)

    @property
    def _shares_first(self) -> bool:
        return self.num_scales > 1 and self.is_guided

    @staticmethod
    def _guide(zero: torch.Tensor, conditional: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return zero + weights.to(zero.dtype) * (conditional - zero)
