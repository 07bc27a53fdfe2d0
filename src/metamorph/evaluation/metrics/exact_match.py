"""Exact match: the answer is one of the right ones, word for word."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from metamorph.evaluation.metrics.text import TextMetric
from metamorph.evaluation.questions import plain


@dataclass(frozen=True)
class ExactMatch(TextMetric):
    """Share of answers that equal a right one, ignoring case, surrounding spaces and a final full stop."""

    name: ClassVar[str] = "exact_match"
    headline: ClassVar[str] = "exact_match"

    def judge(self, text: str, right: Sequence[str]) -> float:
        """1 if the answer is right, else 0."""
        return float(plain(text) in map(plain, right))
