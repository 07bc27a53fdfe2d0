"""Visual question answering: the share of answers that are exactly right, for each type of question."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from metamorph.inference.draw import Progress
from metamorph.inference.reply import Prompt, Reply, reply_to
from metamorph.models.modeling_metamorph import MetaMorphForConditionalGeneration
from metamorph.models.processing_metamorph import MetaMorphProcessor


WORDS = 24
"""New tokens of an answer for words, beside those of one image."""


@dataclass(frozen=True)
class Question:
    """A question with its right answer."""

    kind: str
    """Type of the question; results are reported for each type."""
    prompt: Prompt
    """The question and its pictures."""
    answer: str
    """The right answer."""


@dataclass(frozen=True)
class AnsweredQuestion:
    """A question with the model's answer."""

    question: Question
    """What was asked."""
    reply: Reply
    """What the model said."""

    @property
    def is_right(self) -> bool:
        """Whether the answer is the right one word for word and no picture came with it.

        Capitals, spaces at the ends and a final full stop do not count.
        """
        return not self.reply.num_images and _plain(self.reply.text) == _plain(self.question.answer)


@dataclass(frozen=True)
class QuestionResults:
    """Answers to a set of questions."""

    answered: tuple[AnsweredQuestion, ...]
    """Every question, in the order asked."""

    @property
    def accuracy(self) -> float:
        """Share of right answers, 0 to 1."""
        return fraction([item.is_right for item in self.answered])

    @property
    def per_type(self) -> dict[str, float]:
        """Share of right answers for each type, in alphabetical order."""
        kinds = sorted({item.question.kind for item in self.answered})
        return {
            kind: fraction([item.is_right for item in self.answered if item.question.kind == kind]) for kind in kinds
        }

    def to_dict(self) -> dict[str, Any]:
        """`{"n", "accuracy", "per_type": {type: accuracy}, "n_per_type": {type: number}}`."""
        counts = Counter(item.question.kind for item in self.answered)
        return {
            "n": len(self.answered),
            "accuracy": self.accuracy,
            "per_type": self.per_type,
            "n_per_type": {kind: counts[kind] for kind in sorted(counts)},
        }


def ask(
    model: MetaMorphForConditionalGeneration,
    processor: MetaMorphProcessor,
    questions: Sequence[Question],
    *,
    batch_size: int = 64,
    on_progress: Progress | None = None,
) -> QuestionResults:
    """Ask every question and compare the answers.

    Args:
        model: The model.
        processor: Its processor.
        questions: What to ask.
        batch_size: Questions per batch.
        on_progress: Called with the number of questions just answered.
    """
    prompts = [question.prompt for question in questions]
    replies = reply_to(
        model,
        processor,
        prompts,
        batch_size=batch_size,
        max_new_tokens=answer_budget(processor),
        on_progress=on_progress,
    )
    return QuestionResults(
        tuple(AnsweredQuestion(question, reply) for question, reply in zip(questions, replies, strict=True))
    )


def answer_budget(processor: MetaMorphProcessor) -> int:
    """New tokens of an answer: one image fits, since whether the model draws when it should not is measured, too."""
    return processor.num_image_tokens + 2 + WORDS


def fraction(verdicts: Sequence[bool]) -> float:
    """Share of true values, rounded to four digits; 0 of none."""
    return round(sum(verdicts) / len(verdicts), 4) if verdicts else 0.0


def _plain(text: str) -> str:
    return text.strip().rstrip(".").strip().lower()
