"""ANLS, the average normalised Levenshtein similarity of DocVQA: small spelling mistakes cost little."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from metamorph.evaluation.metrics.text import TextMetric


THRESHOLD = 0.5
"""Below this similarity an answer is wrong rather than misspelt; arXiv 1907.00490, section 4."""


@dataclass(frozen=True)
class Anls(TextMetric):
    """Mean similarity to the nearest right answer, without regard to case and spacing.

    At a similarity of exactly 0.5 the paper's formula gives 0 and the challenge's own script 0.5; this follows the
    script, where published figures come from.
    """

    name: ClassVar[str] = "anls"
    headline: ClassVar[str] = "anls"

    def judge(self, text: str, right: Sequence[str]) -> float:
        """The similarity, 0 if it is below the threshold."""
        best = max(similarity(text, each) for each in right)
        return best if best >= THRESHOLD else 0.0


def similarity(first: str, second: str) -> float:
    """1 minus the edit distance as a share of the longer text."""
    first, second = (" ".join(text.lower().split()) for text in (first, second))
    longest = max(len(first), len(second))
    return 1 - edit_distance(first, second) / longest if longest else 1.0


def edit_distance(first: str, second: str) -> int:
    """The fewest insertions, deletions and replacements of characters that turn one text into the other."""
    above = list(range(len(second) + 1))
    for row, letter in enumerate(first, start=1):
        left = [row]
        for column, other in enumerate(second, start=1):
            left.append(min(above[column] + 1, left[-1] + 1, above[column - 1] + (letter != other)))
        above = left
    return above[-1]
