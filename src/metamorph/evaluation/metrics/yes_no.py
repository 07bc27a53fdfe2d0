"""Yes-or-no questions as in POPE: accuracy, and precision, recall and F1 of "yes"."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from metamorph.evaluation.metrics.base import Tools
from metamorph.evaluation.metrics.text import QuestionMetric
from metamorph.evaluation.questions import plain
from metamorph.evaluation.samples import Answer, Sample


@dataclass(frozen=True)
class YesNo(QuestionMetric):
    """Accuracy, precision, recall and F1 of "yes", share of "yes" answers, and share of answers that are neither.

    An answer that is neither is wrong. POPE's own script counts it as "yes".
    """

    name: ClassVar[str] = "yes_no"
    headline: ClassVar[str] = "f1"

    def check(self, samples: Sequence[Sample]) -> None:
        """Refuse samples whose right answer is neither yes nor no."""
        for sample in samples:
            if sample.reference is None or plain(str(sample.reference)) not in ("yes", "no"):
                raise ValueError(
                    f"the right answer of sample {sample.id} must be yes or no, not {sample.reference!r:.80}"
                )

    def score(self, samples: Sequence[Sample], answers: Sequence[Answer], tools: Tools) -> list[dict[str, float]]:
        """Whether each answer is right, is "yes", is neither yes nor no, and whether "yes" would be, and is, right."""
        scores = []
        for sample, answer in zip(samples, answers, strict=True):
            given, right = None if answer.error else parse(answer.text), plain(sample.reference)
            verdicts = {
                "accuracy": given == right,
                "yes_ratio": given == "yes",
                "unparseable": given is None,
                "is_yes": right == "yes",
                "right_yes": given == right == "yes",
            }
            scores.append({name: float(verdict) for name, verdict in verdicts.items()})
        tools.progress.update(len(scores))
        return scores

    def from_means(self, means: dict[str, Any]) -> dict[str, Any]:
        """The shares, and precision, recall and F1 of "yes"; 0 where nothing could be divided by."""
        said_yes, is_yes, right = means["yes_ratio"], means["is_yes"], means["right_yes"]
        least = np.finfo(float).tiny  # with nothing to divide by there is nothing right, either
        return {
            "accuracy": means["accuracy"],
            "precision": right / np.maximum(said_yes, least),
            "recall": right / np.maximum(is_yes, least),
            "f1": 2 * right / np.maximum(said_yes + is_yes, least),
            "yes_ratio": said_yes,
            "unparseable": means["unparseable"],
        }


def parse(text: str) -> str | None:
    """`yes`, `no`, or None if the answer is neither.

    The first word decides, else the first sentence: as in POPE's script it says no if it has a "no" or "not".
    """
    words = re.findall(r"[a-z']+", text.lower().strip().split(".")[0].replace("’", "'"))
    if words and words[0] in ("yes", "no"):
        return words[0]
    denies = any(word in ("no", "not") or word.endswith("n't") for word in words)
    if denies == ("yes" in words):  # neither, or both
        return None
    return "no" if denies else "yes"
