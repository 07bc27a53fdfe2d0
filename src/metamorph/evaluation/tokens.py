"""Compare generated visual tokens with true ones: their cosine, and the nearest of many candidates.

Cosine alone misleads: two scenes that differ in one attribute may have tokens with a cosine of 0.97. The nearest
neighbour among all candidate scenes shows which scene was meant.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from metamorph.models.losses import constant_cosine_sum, direction_sums


TIE = 1e-6
"""Cosines that differ by less count as equal: copies of an image are each other's originals."""


def mean_cosine(generated: Tensor, true: Tensor) -> Tensor:
    """Cosine of generated and true tokens `[images, N, D]`, averaged over the tokens of an image: `[images]`."""
    return F.cosine_similarity(generated, true, dim=-1).mean(dim=-1)


def best_constant(true: Tensor) -> Tensor:
    """The tokens `[N, D]` with the largest mean cosine to all of `true` `[images, N, D]`; their length is 1."""
    return F.normalize(F.normalize(true, dim=-1).sum(dim=0), dim=-1)


def cosines(generated: Tensor, candidates: Tensor) -> Tensor:
    """Mean cosine over tokens of each generated image and each candidate, `[images, candidates]`."""
    queries, keys = (F.normalize(tokens, dim=-1).flatten(1) for tokens in (generated, candidates))
    return queries @ keys.T / generated.shape[1]


def num_nearer(similar: Tensor, own: Tensor) -> Tensor:
    """How many candidates are nearer to each image than its own, int64 `[images]`; 0 if its own is the nearest.

    `similar` `[images, candidates]` has the cosines of `cosines`, `own` `[images]` the one with the image's own. All
    candidates are nearer than NaN.
    """
    return (~(similar <= own[:, None] + TIE)).sum(dim=1)


def constant_cosine(true: Tensor) -> float:
    """Mean cosine of `true` `[images, N, D]` and the best tokens that are the same for each of them."""
    num_images, num_tokens, _ = true.shape
    places = torch.arange(num_tokens).repeat(num_images)
    sums = direction_sums(true.flatten(0, 1), places, num_tokens)
    return constant_cosine_sum(sums).item() / (num_images * num_tokens)
