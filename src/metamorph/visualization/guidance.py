"""Classifier-free guidance: training drops whole conditions, drawing combines predictions with and without one.

The denoiser calls `drop` in training, the pipeline uses `GuidedBatch`. In both, zeros mean "no condition".
"""

import torch


def drop(condition: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Zero the condition `[images, tokens, features]` of images for which `keep` `[images]` bool is False."""
    # Out of place: the projector's output belongs to the graph of its backward pass.
    return torch.where(keep[:, None, None], condition, torch.zeros_like(condition))


class GuidedBatch:
    """Images that are drawn at several guidance scales together: image 1 at each scale, image 2 at each, …

    The guided prediction is `zero + w · (condition − zero)`. Two shortcuts save work. An image at scale 1 needs no
    unconditional half. And all scales of an image start from the same noise, so in the first step one prediction with
    and one without the condition serve them all; afterwards they differ. `condition` is `[images, tokens, features]`.
    """

    def __init__(self, condition: torch.Tensor, scales: list[float]) -> None:
        self.num_scales = len(scales)
        weights = torch.tensor(scales, dtype=torch.float64).repeat(condition.shape[0])  # (images · scales,)
        self._weights = weights.to(condition.device, torch.float32).view(-1, 1, 1, 1)
        self._guided = (weights != 1).nonzero().flatten().to(condition.device)
        self._is_guided = len(self._guided) > 0
        self._condition = condition
        each = condition.repeat_interleave(self.num_scales, dim=0)
        # The unconditional rows first, then one conditional row for each image and scale.
        self._rows = torch.cat([self._guided, torch.arange(len(weights), device=condition.device)])
        self._conditions = torch.cat([torch.zeros_like(each[self._guided]), each])

    def start(self, latents: torch.Tensor) -> torch.Tensor:
        """Repeat starting noise `[images, …]` for every scale: `[images · scales, …]`."""
        return latents.repeat_interleave(self.num_scales, dim=0)

    def inputs(self, noisy: torch.Tensor, is_first: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents (from `noisy` `[images · scales, …]`) and conditions for the UNet, one row for each prediction."""
        if self._is_shared(is_first):
            noisy = noisy[:: self.num_scales]
            return torch.cat([noisy, noisy]), torch.cat([torch.zeros_like(self._condition), self._condition])
        return noisy[self._rows] if self._is_guided else noisy, self._conditions

    def combine(self, prediction: torch.Tensor, is_first: bool) -> torch.Tensor:
        """From the UNet's predictions for `inputs` to the guided one, `[images · scales, …]`."""
        if self._is_shared(is_first):
            zero, conditional = (half.repeat_interleave(self.num_scales, dim=0) for half in prediction.chunk(2))
            return self._guide(zero, conditional, self._weights)
        if not self._is_guided:
            return prediction
        zero, conditional = prediction[: len(self._guided)], prediction[len(self._guided) :]
        guided = self._guide(zero, conditional[self._guided], self._weights[self._guided])
        return conditional.index_copy(0, self._guided, guided)

    def _is_shared(self, is_first: bool) -> bool:
        return is_first and self.num_scales > 1 and self._is_guided

    @staticmethod
    def _guide(zero: torch.Tensor, conditional: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return zero + weights.to(zero.dtype) * (conditional - zero)
