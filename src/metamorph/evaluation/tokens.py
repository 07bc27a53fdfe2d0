"""Compare generated visual tokens with true ones: their cosine, and the nearest of many candidates.

Cosine alone misleads: two scenes that differ in one attribute may have tokens with a cosine of 0.97. The nearest
neighbour among all candidate scenes shows which scene was meant.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def mean_cosine(generated: Tensor, true: Tensor) -> Tensor:
    """Cosine of generated and true tokens `[images, N, D]`, averaged over the tokens of an image: `[images]`."""
    return F.cosine_similarity(generated, true, dim=-1).mean(dim=-1)


def nearest_candidates(generated: Tensor, candidates: Tensor) -> Tensor:
    """Index of the one of `candidates` `[candidates, N, D]` with the largest mean cosine, int64 `[images]`."""
    if not candidates.shape[0]:
        raise ValueError("candidates is empty; give at least one image to compare with")
    queries = F.normalize(generated, dim=-1).flatten(1)
    keys = F.normalize(candidates, dim=-1).flatten(1)
    return torch.argmax(queries @ keys.T, dim=1)
