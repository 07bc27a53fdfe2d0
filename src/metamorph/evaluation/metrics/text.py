"""What metrics of short answers share: how texts are compared, and a score for each answer by itself."""

import re
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from metamorph.evaluation.metrics.base import Metric, Tools
from metamorph.evaluation.questions import plain
from metamorph.evaluation.samples import Answer, Sample


_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?(%?)", re.IGNORECASE)


def number(text: str) -> float | None:
    """The number that the text consists of, `12%` as 0.12; None if it is anything else."""
    match = _NUMBER.fullmatch(plain(text))
    if match is None:
        return None
    value = float(match[0].rstrip("%"))
    return value / 100 if match[3] else value


def references(sample: Sample) -> list[str]:
    """The right answers of a sample whose reference is one text or a list of them."""
    found = [sample.reference] if isinstance(sample.reference, str) else sample.reference
    if not isinstance(found, (list, tuple)) or not found or not all(isinstance(each, str) for each in found):
        raise ValueError(
            f"sample {sample.id} needs a right answer, a text or a list of texts, not {sample.reference!r:.80}: "
            "take a metric that suits the loader"
        )
    return list(found)


@dataclass(frozen=True)
class QuestionMetric(Metric):
    """Judges answers to questions about images or videos."""

    def unit(self, sample: Sample) -> str:
        """Questions about the same image are chosen and resampled together."""
        return next(iter((*sample.images, *sample.videos)), sample.id)


@dataclass(frozen=True)
class TextMetric(QuestionMetric):
    """Compares the text of each answer with the right ones; the mean over all samples is reported."""

    @abstractmethod
    def judge(self, text: str, right: Sequence[str]) -> float:
        """How good an answer is, from 0 to 1."""

    def check(self, samples: Sequence[Sample]) -> None:
        """Refuse samples without right answers."""
        for sample in samples:
            references(sample)

    def score(self, samples: Sequence[Sample], answers: Sequence[Answer], tools: Tools) -> list[dict[str, float]]:
        """`{headline: figure}` of each sample, 0 for an answer with an error."""
        scores = [
            {self.headline: 0.0 if answer.error else self.judge(answer.text, references(sample))}
            for sample, answer in zip(samples, answers, strict=True)
        ]
        tools.progress.update(len(scores))
        return scores
