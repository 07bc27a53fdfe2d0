"""Multiple choice: which option an answer names, by letter or by text, and accuracy of questions asked more than once.

The reference of a sample is `{"answer": letter, "options": {letter: text}}`, also `"group"` for questions that belong
together. Without options the question is open, and `"answer"` a text or a list of texts.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from metamorph.evaluation.metrics.base import Tools
from metamorph.evaluation.metrics.text import QuestionMetric, number
from metamorph.evaluation.questions import plain
from metamorph.evaluation.samples import Answer, Sample


_ALONE = re.compile(r"\(?([A-Za-z])[).:,]{0,2}")
_NAMED = re.compile(
    r"(?i:\b(?:answer|option|choice)\b(?:\s+is|\s*:)*)\s*[*\"'(]*(?i:option\s+)?([A-Z]\b|[a-z](?=[).,:;*\"'\s]*$))"
)
_MARKED = re.compile(r"\(([A-Za-z])\)|(?:^|(?<=[\s*]))([A-Z])[).:](?=[\s*]|$)")
_LEADING = re.compile(r"\s*(?:\(([A-Za-z])\)|([A-Za-z])[).:])(?=\s|$)(.*)", re.DOTALL)
_BARE = re.compile(r"(?<![\w'-])([A-Z])(?![\w'-])")
"""A letter by itself, not that of "T-shirt"."""
_ARTICLE = re.compile(
    r"(?:^|(?<=[.!?:]\s))[AI](?=\s+(?!(?:or|and|is|as|since|because|the|it|this)\b)[a-z])|(?<![\w'])I(?=\s+[a-z])"
)
"""A capital that is a word, as in "A red ball", "Answer: A ball" or "I think"."""


@dataclass(frozen=True)
class MultipleChoice(QuestionMetric):
    """Share of right answers. An answer that names no option, or more than one, is wrong.

    Open questions are right if the text or, to two decimals, the number is that of a right answer.
    """

    name: ClassVar[str] = "multiple_choice"
    headline: ClassVar[str] = "accuracy"

    def check(self, samples: Sequence[Sample]) -> None:
        """Refuse samples without options."""
        for sample in samples:
            if not _has(sample, "options"):
                raise ValueError(
                    f"{self.name} needs questions with options, but sample {sample.id} has none: name the columns of "
                    "the options in the spec's data, or take another metric"
                )

    def score(self, samples: Sequence[Sample], answers: Sequence[Answer], tools: Tools) -> list[dict[str, float]]:
        """`accuracy` of each sample; those of the group with its first sample."""
        verdicts = [
            not answer.error and is_right(answer.text, sample.reference)
            for sample, answer in zip(samples, answers, strict=True)
        ]
        scores = [{"accuracy": float(verdict)} for verdict in verdicts]
        tools.progress.update(len(scores))
        return scores


@dataclass(frozen=True)
class _GroupedChoice(MultipleChoice):
    """Also counts the groups in which every answer is right. That figure is kept with a group's first sample."""

    def unit(self, sample: Sample) -> str:
        """The questions of a group are chosen and resampled together."""
        return sample.reference["group"] if _has(sample, "group") else sample.id

    def check(self, samples: Sequence[Sample]) -> None:
        """Refuse samples without options or group."""
        super().check(samples)
        for sample in samples:
            if not _has(sample, "group"):
                raise ValueError(
                    f"{self.name} needs questions in groups, but sample {sample.id} has none: take multiple_choice"
                )

    def score(self, samples: Sequence[Sample], answers: Sequence[Answer], tools: Tools) -> list[dict[str, float]]:
        """`accuracy` of each sample, and the headline with the first of each group."""
        scores = super().score(samples, answers, tools)
        for members in groups(samples).values():
            all_right = all(scores[index]["accuracy"] for index in members)
            scores[members[0]][self.headline] = float(all_right)
        return scores


@dataclass(frozen=True)
class PairedChoice(_GroupedChoice):
    """As `multiple_choice`, and the share of pairs with two right answers, MMVP's accuracy (arXiv 2401.06209)."""

    name: ClassVar[str] = "paired_choice"
    headline: ClassVar[str] = "pair_accuracy"

    def check(self, samples: Sequence[Sample]) -> None:
        """Refuse samples that are not pairs."""
        super().check(samples)
        for group, members in groups(samples).items():
            if len(members) != 2:
                raise ValueError(f"{self.name} needs pairs, but the group {group} has {len(members)} questions")


@dataclass(frozen=True)
class CircularChoice(_GroupedChoice):
    """MMBench's CircularEval (arXiv 2307.06281): a question counts if it is right for each rotation of its options.

    `accuracy` is that of the questions as published, `rotated_accuracy` that of the rotations.
    """

    name: ClassVar[str] = "circular_choice"
    headline: ClassVar[str] = "circular_accuracy"

    def score(self, samples: Sequence[Sample], answers: Sequence[Answer], tools: Tools) -> list[dict[str, float]]:
        """`accuracy` and `circular_accuracy` of questions as published, `rotated_accuracy` of rotations."""
        scores = super().score(samples, answers, tools)
        for members in groups(samples).values():
            for index in members[1:]:
                scores[index]["rotated_accuracy"] = scores[index].pop("accuracy")
        return scores


def groups(samples: Sequence[Sample]) -> dict[str, list[int]]:
    """The numbers of the samples of each group, in order."""
    found: dict[str, list[int]] = {}
    for index, sample in enumerate(samples):
        found.setdefault(sample.reference["group"], []).append(index)
    return found


def is_right(text: str, reference: Mapping[str, Any]) -> bool:
    """Whether the answer names the right option or, to an open question, is a right answer."""
    if reference["options"]:
        return parse_choice(text, reference["options"]) == reference["answer"]
    right = [reference["answer"]] if isinstance(reference["answer"], str) else reference["answer"]
    given = number(text)
    numbers = [number(each) for each in right]
    return plain(text) in map(plain, right) or (
        given is not None and any(each is not None and round(each, 2) == round(given, 2) for each in numbers)
    )


def parse_choice(text: str, options: Mapping[str, str]) -> str | None:
    """The letter of the option that the answer names; None if it names none or several.

    What is tried, in this order: the answer is a letter, or an option's text; it says "the answer is B"; it begins with
    or contains "(B)" or "B."; it contains a letter by itself; it contains the text of one option.
    """
    text = text.strip()
    if match := _ALONE.fullmatch(text):
        return match[1].upper() if match[1].upper() in options else None
    if equal := {letter for letter, option in options.items() if plain(option) == plain(text)}:
        return _only(equal)
    if (match := _LEADING.fullmatch(text)) and (first := (match[1] or match[2]).upper()) in options:
        rest = {letter for letter, option in options.items() if plain(option) == plain(match[3])}
        return _only({first} | (rest or _letters(_MARKED, match[3], options)))
    words = _ARTICLE.sub(" ", text)
    for pattern, searched in ((_NAMED, words), (_MARKED, text), (_BARE, words)):
        if found := _letters(pattern, searched, options):
            return _only(found)
    return _contained(text, options)


def _contained(text: str, options: Mapping[str, str]) -> str | None:
    """The option whose text is in the answer, if it is only one; "dark red" does not also count as "red"."""
    rest, found = text.lower(), set()
    for option in sorted(set(map(plain, options.values())), key=len, reverse=True):
        whole = re.compile(rf"(?<!\w){re.escape(option)}(?!\w)")
        if option and whole.search(rest):
            found.add(option)
            rest = whole.sub("|", rest)
    return _only({letter for letter, option in options.items() if plain(option) in found})


def _has(sample: Sample, key: str) -> bool:
    return isinstance(sample.reference, Mapping) and key in sample.reference


def _letters(pattern: re.Pattern[str], text: str, options: Mapping[str, str]) -> set[str]:
    """The options whose letters are found; other letters are words, as in "vitamin E"."""
    return {next(filter(None, match.groups())).upper() for match in pattern.finditer(text)} & set(options)


def _only(letters: set[str]) -> str | None:
    """The letter if it is only one."""
    return next(iter(letters)) if len(letters) == 1 else None
