"""DPG-Bench, WISE and edits: a vision-language model at an endpoint looks at images and answers questions."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from metamorph.data.tasks.base import fill
from metamorph.evaluation.endpoint import Endpoint, Question
from metamorph.evaluation.metrics.base import Metric, Scores, Tools
from metamorph.evaluation.metrics.yes_no import parse
from metamorph.evaluation.samples import Answer, Sample


logger = logging.getLogger(__name__)

_WISE_SCORES = {"consistency": 0.7, "realism": 0.2, "aesthetic quality": 0.1}
"""Names in a judge's answer, and their weights in the WiScore."""
_WISE_PROMPT = """\
Judge how well this generated image does what its prompt asks for. Be strict: give 2 only without any doubt.

Prompt: {prompt}
What the prompt means: {explanation}

Give three scores of 0, 1 or 2:
- Consistency: does the image show what the prompt means? 0: it misses or contradicts the main thing. 1: partly. \
2: everything, exactly.
- Realism: 0: it breaks the laws of nature or is plainly artificial. 1: small flaws. 2: like a photograph.
- Aesthetic Quality: 0: unpleasant or without composition. 1: ordinary. 2: outstanding.

Answer in three lines and nothing else:
Consistency: <score>
Realism: <score>
Aesthetic Quality: <score>"""
_EDIT_PROMPT = """\
The first image is the original, the second one an edited version of it. They may be the same if the edit failed.

Instruction: {instruction}

Give two scores from 0 to 10:
1. How well is the instruction carried out? 0: not at all. 10: perfectly.
2. How well is the rest of the original kept? 0: it is another scene. 10: nothing changes that did not have to.

Answer with the two scores in brackets and nothing else, such as [7, 4]."""
_QUALITY_PROMPT = """\
Give this generated image two scores from 0 to 10:
1. Does it look natural? 0: distances, shadows or light are wrong. 10: completely.
2. Is it free of artifacts, such as distortions, watermarks, blurred faces or wrong body parts? 0: it is full of them. \
10: there are none.

Answer with the two scores in brackets and nothing else, such as [7, 4]."""


@dataclass(frozen=True)
class Judged(Endpoint, Metric):
    """A metric whose judge is an endpoint."""

    needs_images: ClassVar[bool] = True

    def check(self, samples: Sequence[Sample]) -> None:
        """See `Metric.check`."""
        self.check_reachable()

    def answers_of(self, questions: Sequence[Sequence[Question]], tools: Tools) -> list[list[str]]:
        """The judge's answers to each sample's questions."""
        answers = self.ask([question for each in questions for question in each], tools.folder)
        found = []
        for each in questions:
            found.append([next(answers) for _ in each])
            tools.progress.update()
        return found


@dataclass(frozen=True)
class Dpg(Judged):
    """DPG-Bench: the share of an image's questions that are answered with yes, none counting without its parents."""

    name: ClassVar[str] = "dpg"
    headline: ClassVar[str] = "score"

    def score(self, samples: Sequence[Sample], answers: Sequence[Answer], tools: Tools) -> list[dict[str, float]]:
        """`score`, the mean over images, for each category the numbers of its questions and of yes, and `judged`: the
        share of the judge's answers that are yes or no. Others count as no.
        """
        questions = [
            [
                Question(f"{question['text']} Answer with yes or no only.", (image,))
                for image in answer.images
                for question in sample.reference
            ]
            for sample, answer in zip(samples, answers, strict=True)
        ]
        found = []
        for sample, replies in zip(samples, self.answers_of(questions, tools), strict=True):
            asked = sample.reference
            verdicts = [parse(reply) for reply in replies]
            is_yes = [verdict == "yes" for verdict in verdicts] or [False] * len(asked)
            images = [is_yes[start : start + len(asked)] for start in range(0, len(is_yes), len(asked))]
            scores = {"score": sum(_share_of_yes(asked, each) for each in images) / len(images)}
            scores["judged"] = _share_of_readable(verdicts)
            for question, counts in zip(asked * len(images), is_yes, strict=True):
                for suffix, count in (("asked", 1), ("yes", counts)):
                    name = f"{question['category']}_{suffix}"
                    scores[name] = scores.get(name, 0.0) + count
            found.append(scores)
        _warn_of_unreadable(found)
        return found

    def summarise(self, samples: Sequence[Sample], scores: Sequence[Scores]) -> dict[str, float]:
        """`score`, `judged`, and for each category the share of its questions answered with yes, parents or not."""
        names = dict.fromkeys(
            name.removesuffix("_asked") for each in scores for name in each if name.endswith("_asked")
        )
        shares = {
            name: sum(each.get(f"{name}_yes", 0.0) for each in scores)
            / sum(each.get(f"{name}_asked", 0.0) for each in scores)
            for name in names
        }
        means = {name: sum(each[name] for each in scores) / max(len(scores), 1) for name in ("score", "judged")}
        return {**means, **shares}


def _share_of_yes(questions: Sequence[dict[str, Any]], verdicts: Sequence[bool]) -> float:
    """A question counts as no if one of its parents, which come before it, does."""
    counted = {question["id"]: verdict for question, verdict in zip(questions, verdicts, strict=True)}
    for question in questions:
        counted[question["id"]] &= all(counted[parent] for parent in question["parents"])
    return sum(counted.values()) / len(counted)


def _check_wording(option: str, file: str | None, *names: str) -> None:
    """Raise a `ValueError` unless `file` is None or a text whose braces have only these names."""
    if file is None:
        return
    if not Path(file).is_file():
        raise ValueError(f"{option} {file} does not exist: give a text file")
    for name in re.findall(r"\{(\w+)\}", _wording(file, "")):
        if name not in names:
            raise ValueError(f"{option} {file} names {{{name}}}, but there is only {', '.join(names) or 'nothing'}")


def _wording(file: str | None, default: str) -> str:
    return default if file is None else Path(file).read_text(encoding="utf-8")


def _share_of_readable(verdicts: Sequence[object | None]) -> float:
    """Share of a judge's answers that could be read, thus are not None; 1 if nothing was asked."""
    return sum(each is not None for each in verdicts) / len(verdicts) if verdicts else 1.0


def _warn_of_unreadable(scores: Sequence[Scores]) -> None:
    if unreadable := sum(each["judged"] < 1 for each in scores):
        logger.warning(
            "answers of the judge about %d of %d samples cannot be read; each counts as 0", unreadable, len(scores)
        )


@dataclass(frozen=True)
class Wise(Judged):
    """WISE: the WiScore, (0.7 consistency + 0.2 realism + 0.1 aesthetic quality) / 2, each from 0 to 2."""

    name: ClassVar[str] = "wise"
    headline: ClassVar[str] = "wiscore"
    judge_prompt: str | None = None
    """A text file with the benchmark's own wording, to reproduce its figures; with `{prompt}` and `{explanation}`."""

    def check(self, samples: Sequence[Sample]) -> None:
        """See `Metric.check`."""
        _check_wording("judge_prompt", self.judge_prompt, "prompt", "explanation")
        super().check(samples)

    def score(self, samples: Sequence[Sample], answers: Sequence[Answer], tools: Tools) -> list[dict[str, float]]:
        """`wiscore`, its three parts, and `judged`: the share of images for which the judge's answer could be read."""
        wording = _wording(self.judge_prompt, _WISE_PROMPT)
        questions = [
            [Question(fill(wording, **sample.reference), (image,)) for image in answer.images]
            for sample, answer in zip(samples, answers, strict=True)
        ]
        found = []
        for replies in self.answers_of(questions, tools):
            scores = [_wise_scores(reply) for reply in replies]
            count = max(len(scores), 1)
            means = {name: sum(each[name] for each in scores if each is not None) / count for name in _WISE_SCORES}
            wiscore = sum(weight * means[name] for name, weight in _WISE_SCORES.items()) / 2
            parts = {name.replace(" ", "_"): mean for name, mean in means.items()}
            found.append({"wiscore": wiscore, **parts, "judged": _share_of_readable(scores)})
        _warn_of_unreadable(found)
        return found


def _wise_scores(reply: str) -> dict[str, int] | None:
    """The three scores in a judge's answer; None if one is missing."""
    pairs = re.findall(rf"({'|'.join(_WISE_SCORES)})[*\s]*:[*\s]*([012])\b", reply, re.IGNORECASE)
    scores = {name.lower(): int(score) for name, score in pairs}
    return scores if len(scores) == len(_WISE_SCORES) else None


@dataclass(frozen=True)
class EditJudge(Judged):
    """GEdit-Bench: semantic consistency and perceptual quality from 0 to 10, and their geometric mean.

    Both are the lower of two scores: of carrying out the instruction and keeping the rest, of looking natural and
    being free of artifacts.
    """

    name: ClassVar[str] = "edit_judge"
    headline: ClassVar[str] = "overall"
    judge_prompt: str | None = None
    """A text file with the benchmark's own wording for the first pair, with `{instruction}`."""
    quality_prompt: str | None = None
    """The same for the second pair."""

    def check(self, samples: Sequence[Sample]) -> None:
        """See `Metric.check`."""
        _check_wording("judge_prompt", self.judge_prompt, "instruction")
        _check_wording("quality_prompt", self.quality_prompt)
        super().check(samples)

    def score(self, samples: Sequence[Sample], answers: Sequence[Answer], tools: Tools) -> list[dict[str, float]]:
        """`semantic_consistency`, `perceptual_quality`, `overall`, and `judged` as for WISE."""
        wording = _wording(self.judge_prompt, _EDIT_PROMPT)
        about_quality = _wording(self.quality_prompt, _QUALITY_PROMPT)
        questions = []
        for sample, answer in zip(samples, answers, strict=True):
            original, instruction = Path(sample.files["image"]), sample.reference["instruction"]
            about_edit = fill(wording, instruction=instruction)
            questions.append(
                [
                    question
                    for image in answer.images
                    for question in (Question(about_edit, (original, image)), Question(about_quality, (image,)))
                ]
            )
        found = []
        for replies in self.answers_of(questions, tools):
            lowest = [_lowest_score(reply) for reply in replies]
            judged = [
                (consistency, quality) if consistency is not None and quality is not None else None
                for consistency, quality in zip(lowest[::2], lowest[1::2], strict=True)
            ]
            pairs = [pair for pair in judged if pair is not None]
            count = max(len(judged), 1)
            found.append(
                {
                    "overall": sum(math.sqrt(consistency * quality) for consistency, quality in pairs) / count,
                    "semantic_consistency": sum(consistency for consistency, _ in pairs) / count,
                    "perceptual_quality": sum(quality for _, quality in pairs) / count,
                    "judged": _share_of_readable(judged),
                }
            )
        _warn_of_unreadable(found)
        return found


def _lowest_score(reply: str) -> float | None:
    """The lower of the two scores in brackets; None if there are none from 0 to 10."""
    found = re.search(r"\[\s*(\d+(?:\.\d+)?)\s*,\s*(\d+(?:\.\d+)?)\s*\]", reply)
    scores = [float(score) for score in found.groups()] if found else []
    return min(scores) if scores and max(scores) <= 10 else None
