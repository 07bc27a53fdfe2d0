"""Visual question answering: the share of answers that are exactly right, for each type of question."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from metamorph.inference.draw import ProgressCallback
from metamorph.inference.prompt import Prompt
from metamorph.inference.reply import Reply, reply_to
from metamorph.models.modeling_metamorph import MetaMorphForConditionalGeneration
from metamorph.models.processing_metamorph import MetaMorphProcessor


WORDS = 24
"""New tokens for the words of an answer, besides those of one image."""


@dataclass(frozen=True)
class Question:
    """A question and its right answer."""

    kind: str
    """Type of the question; results are reported for each type."""
    prompt: Prompt
    answer: str


@dataclass(frozen=True)
class AnsweredQuestion:
    """A question and the model's answer."""

    question: Question
    reply: Reply

    @property
    def is_right(self) -> bool:
        """Whether the answer is right word for word and comes without an image.

        Case, surrounding spaces and a final full stop do not count.
        """
        return not self.reply.num_images and plain(self.reply.text) == plain(self.question.answer)


def summarise_answers(answered: Sequence[AnsweredQuestion]) -> dict[str, Any]:
    """`{"n", "accuracy", "per_type": {type: accuracy}, "n_per_type": {type: number}}`, types in order."""
    verdicts: dict[str, list[bool]] = {kind: [] for kind in sorted({item.question.kind for item in answered})}
    for item in answered:
        verdicts[item.question.kind].append(item.is_right)
    return {
        "n": len(answered),
        "accuracy": fraction([item.is_right for item in answered]),
        "per_type": {kind: fraction(found) for kind, found in verdicts.items()},
        "n_per_type": {kind: len(found) for kind, found in verdicts.items()},
    }


def ask(
    model: MetaMorphForConditionalGeneration,
    processor: MetaMorphProcessor,
    questions: Sequence[Question],
    on_progress: ProgressCallback | None = None,
) -> list[AnsweredQuestion]:
    """Ask every question; the answers are in the same order."""
    prompts = [question.prompt for question in questions]
    replies = reply_to(model, processor, prompts, max_new_tokens=answer_budget(processor), on_progress=on_progress)
    return list(map(AnsweredQuestion, questions, replies))


def answer_budget(processor: MetaMorphProcessor) -> int:
    """New tokens of an answer. One image fits: whether the model draws when it should not is measured, too."""
    return processor.num_image_tokens + 2 + WORDS


def fraction(verdicts: Sequence[bool]) -> float:
    """Share of true values, rounded to four digits; 0 if there are none."""
    return round(sum(verdicts) / len(verdicts), 4) if verdicts else 0.0


def plain(text: str) -> str:
    """The text without what does not count: case, surrounding spaces and a final full stop."""
    return text.strip().rstrip(".").strip().lower()
