"""Relaxed accuracy of ChartQA: numbers may be off by 5 %, texts must match exactly."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from metamorph.evaluation.metrics.text import TextMetric, number
from metamorph.evaluation.questions import plain


TOLERANCE = 0.05
"""Of the right number; arXiv 2203.10244, section 5.1."""


@dataclass(frozen=True)
class RelaxedAccuracy(TextMetric):
    """Share of answers within 5 % of a right number, or equal to a right text.

    As in the code that published figures come from (Pix2Struct's, used by Qwen-VL and lmms-eval), `12%` is the number
    0.12, so it differs from `12`.
    """

    name: ClassVar[str] = "relaxed_accuracy"
    headline: ClassVar[str] = "relaxed_accuracy"

    def judge(self, text: str, right: Sequence[str]) -> float:
        """1 if the answer is right, else 0."""
        return float(any(is_close(text, each) for each in right))


def is_close(text: str, right: str) -> bool:
    """Whether the answer is within 5 % of the right number, or the same text."""
    given, target = number(text), number(right)
    if given is None or target is None:
        return plain(text) == plain(right)
    return abs(given - target) <= TOLERANCE * abs(target)
