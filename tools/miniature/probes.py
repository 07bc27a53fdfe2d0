"""Linear probes: can a linear map read from a visual token what its part of the image shows?

The probes read the tokens that the LLM reads: reduced to 4×4 and normalised. One linear map for all 16 tokens predicts
from a single token the shape, colour, size and position of the object in its cell, or that there is none. It has only
`hidden` weights per class: a probe on all tokens at once could read even a tower of random weights. It is a ridge
regression to one-hot targets, solved in closed form, so fitting is exact, deterministic and takes a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from metamorph.miniature.world.cells import GRID, cell_labels, cells_of
from metamorph.miniature.world.render import render_array
from metamorph.miniature.world.scenes import ATTRIBUTES, Scene, sample_scene


PROBE_NAMES = tuple(ATTRIBUTES)
"""The four probes that gates are set on."""


def scene_pixels(scenes: Sequence[Scene], rng: np.random.Generator | None = None, *, noise: float = 0.0) -> Tensor:
    """Draw scenes as the SigLIP image processor would hand them over, `[scenes, 3, 64, 64]` float32 in -1..1.

    Args:
        scenes: What to draw.
        rng: Source of the drawings' jitter and noise; without it the drawings are exact.
        noise: Largest standard deviation of Gaussian pixel noise, in the units of the result; each image
            has its own standard deviation between 0 and this.
    """
    images = np.stack([render_array(scene, rng) for scene in scenes])
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    if rng is not None and noise > 0:
        deviation = rng.uniform(0, noise, (len(scenes), 1, 1, 1))
        pixels = pixels + torch.from_numpy(rng.standard_normal(pixels.shape) * deviation).float()
    return pixels.contiguous()


def probe_scenes(rng: np.random.Generator, count: int, *, num_objects: int, reserved: bool) -> list[Scene]:
    """Sample `count` scenes of one or two objects; `reserved` ones occur in no training."""
    return [sample_scene(rng, num_objects=num_objects, reserved=reserved) for _ in range(count)]


@dataclass(frozen=True)
class LinearProbes:
    """Fitted probes."""

    mean: Tensor
    """Mean of the tokens, `[hidden]`."""
    weight: Tensor
    """`[hidden, classes]`, the classes of all attributes side by side."""
    bias: Tensor
    """`[classes]`."""

    @classmethod
    def fit(cls, tokens: Tensor, scenes: Sequence[Scene], ridge: float = 1e-4) -> LinearProbes:
        """Fit all probes at once.

        Args:
            tokens: Visual tokens `[scenes, 16, hidden]`.
            scenes: What each image shows.
            ridge: Penalty on squared weights, relative to the mean variance of a feature.

        Raises:
            ValueError: `tokens` is not of 16 tokens for each scene.
        """
        if tokens.shape[:2] != (len(scenes), GRID * GRID):
            raise ValueError(
                f"tokens has shape {list(tokens.shape)}, expected [{len(scenes)} scenes, {GRID * GRID}, hidden]."
            )
        features = tokens.flatten(0, 1).double()
        labels = cell_labels(scenes).flatten(0, 1)
        targets = torch.cat(
            [torch.nn.functional.one_hot(labels[:, i], n) for i, n in enumerate(_class_counts())], dim=1
        ).double()
        mean, bias = features.mean(0), targets.mean(0)
        features, targets = features - mean, targets - bias
        gram = features.T @ features
        gram.diagonal().add_(ridge * gram.diagonal().mean())
        weight = torch.linalg.solve(gram, features.T @ targets)
        return cls(mean.float(), weight.float(), bias.float())

    def accuracy(self, tokens: Tensor, scenes: Sequence[Scene]) -> dict[str, float]:
        """Fractions read right, on images that the probes were not fitted on.

        Each object is read from the mean score of its four tokens, "no object" being a possible answer.

        Args:
            tokens: Visual tokens `[scenes, 16, hidden]`.
            scenes: What each image shows.

        Returns:
            `shape`, `color`, `size`, `position`: fraction of objects whose attribute is read right. `all`:
            fraction of images in which every attribute of every object is.
        """
        scores = (tokens.float() - self.mean) @ self.weight + self.bias
        parts = scores.split(_class_counts(), dim=-1)
        labels = cell_labels(scenes)
        right: list[list[bool]] = []
        images_right = 0
        for row, scene in enumerate(scenes):
            verdicts = []
            for item in scene.objects:
                cells = cells_of(item.position)
                read = [int(part[row, cells].mean(0).argmax()) for part in parts]
                verdicts.append([a == b for a, b in zip(read, labels[row, cells[0]].tolist(), strict=True)])
            right += verdicts
            images_right += all(map(all, verdicts))
        fractions = np.mean(right, axis=0)
        return {
            **{name: float(value) for name, value in zip(ATTRIBUTES, fractions, strict=True)},
            "all": images_right / len(scenes),
        }


def _class_counts() -> list[int]:
    return [len(words) + 1 for words in ATTRIBUTES.values()]
