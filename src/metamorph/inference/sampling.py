"""How tokens of text are chosen: greedily, or sampled from a row's own random numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessor


MAX_SEED = 2**53 - 1
"""JSON's integers are exact up to here: other programs read them as floats."""


@dataclass(frozen=True)
class Sampling:
    """How the tokens of one answer are chosen. Images of the answer are not sampled: their tokens are predicted."""

    temperature: float = 0.0
    """0 takes the most likely token."""
    top_p: float = 1.0
    """Sample from the most likely tokens whose probabilities reach this sum."""
    top_k: int = 0
    """Sample from this number of the most likely tokens; 0 is all."""
    seed: int | None = None
    """Of the random numbers; None takes another seed each time."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be a number from 0: {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1: {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must not be negative: {self.top_k}")


class RowSampler(LogitsProcessor):
    """Chooses a token for each row with its own settings and random numbers: rows that share a batch are independent.

    It leaves only the chosen token possible, so `generate` runs with `do_sample=False`.
    """

    is_last = True  # for `generate`: after the grammar of images

    def __init__(self, rows: Sequence[Sampling], device: torch.device):
        # On the CPU, so that every device samples from the same numbers.
        self.generators = [torch.Generator("cpu") for _ in rows]
        for row, generator in zip(rows, self.generators, strict=True):
            generator.seed() if row.seed is None else generator.manual_seed(row.seed)
        temperature = torch.tensor([row.temperature for row in rows], device=device)[:, None]
        self.is_greedy = temperature == 0  # (batch, 1)
        self.temperature = torch.where(self.is_greedy, 1.0, temperature)
        self.top_p = torch.tensor([row.top_p for row in rows], device=device)[:, None]
        most = torch.iinfo(torch.long).max
        self.top_k = torch.tensor([row.top_k or most for row in rows], device=device)[:, None]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Choose from [batch, vocabulary] scores."""
        uniform = torch.cat([torch.rand(1, generator=generator) for generator in self.generators])
        # From the largest, so that a small temperature overflows to -inf only.
        scaled = (scores - scores.amax(dim=-1, keepdim=True)) / self.temperature
        ordered, tokens = scaled.sort(dim=-1, descending=True, stable=True)
        probabilities = ordered.softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities  # of all tokens that are more likely
        rank = torch.arange(scores.shape[-1], device=scores.device)
        possible = (before < self.top_p) & (rank < self.top_k)
        possible[:, 0] = True  # rounding
        total = (probabilities * possible).cumsum(dim=-1)
        point = uniform.to(scores.device, total.dtype)[:, None] * total[:, -1:]
        sampled = (total <= point).sum(dim=-1, keepdim=True).clamp(max=possible.sum(dim=-1, keepdim=True) - 1)
        chosen = tokens.gather(1, torch.where(self.is_greedy, 0, sampled))
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)
