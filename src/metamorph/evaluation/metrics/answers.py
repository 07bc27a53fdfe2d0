"""Answers to your own records: texts word for word, images where they are due, and images beside the true ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from PIL import Image, ImageOps
from torch import Tensor

from metamorph.data.checks.walk import spread
from metamorph.evaluation.metrics.base import Metric, Tools
from metamorph.evaluation.metrics.visual_tokens import encode_files
from metamorph.evaluation.questions import plain
from metamorph.evaluation.samples import Answer, Sample
from metamorph.evaluation.tokens import best_constant, cosines, mean_cosine, num_nearer
from metamorph.inference.answer_files import load_tokens
from metamorph.inference.session import Session
from metamorph.models.image_files import load_image
from metamorph.models.image_inputs import to_pil_image
from metamorph.visualization.grids import image_grid


SHEET_FILE = "sheet.png"
_SHEET_COLUMNS, _SHEET_ROWS, _SIDE = 4, 8, 128
"""Pairs of images in a row, rows, and pixels of an image."""


@dataclass(frozen=True)
class Answers(Metric):
    """Compares text and images of each answer with the true ones; samples are those of the loader `records`.

    Visual tokens of the first image of an answer are compared with those of the true image, with those of all other
    true images, and with those of the other answers: a model that draws the same for every prompt has a high cosine.
    """

    name: ClassVar[str] = "answers"
    headline: ClassVar[str] = "exact_match"
    needs_visual_tokens: ClassVar[bool] = True

    def unit(self, sample: Sample) -> str:
        """Answers of the same record are chosen and resampled together."""
        return sample.fields["record"]

    def check(self, samples: Sequence[Sample]) -> None:
        """Refuse samples of other loaders."""
        for sample in samples:
            if not isinstance(sample.reference, Mapping) or not {"text", "images"} <= sample.reference.keys():
                raise ValueError(f"sample {sample.id} has no true answer: the metric answers needs the loader records")

    def score(self, samples: Sequence[Sample], answers: Sequence[Answer], tools: Tools) -> list[dict[str, float]]:
        """Figures of each sample, see the documentation; those of images where the true answer has one.

        With a visualizer it also saves `sheet.png`: true images, and what was drawn.
        """
        scores = [_judge(*each) for each in zip(samples, answers, strict=True)]
        (tools.folder / SHEET_FILE).unlink(missing_ok=True)
        due = [number for number, sample in enumerate(samples) if "target" in sample.files]
        if due:
            targets = [samples[number].files["target"] for number in due]
            found = _compare(tools.open_session(), targets, [answers[number].visual_tokens[:1] for number in due])
            for number, figures in zip(due, found, strict=True):
                scores[number] |= figures
            drawn = [answers[number].images[:1] for number in due]
            if any(drawn):
                _save_sheet(targets, drawn, tools.folder / SHEET_FILE)
        tools.progress.update(len(samples))
        return scores


def _judge(sample: Sample, answer: Answer) -> dict[str, float]:
    """Whether the text is right, and whether there are as many images as are due; neither if there is an error."""
    due, has = sample.reference["images"], len(answer.visual_tokens)
    return {
        "exact_match": float(not answer.error and plain(answer.text) == plain(sample.reference["text"])),
        ("image_when_due" if due else "no_image_when_none_due"): float(not answer.error and has == due),
    }


def _compare(session: Session, targets: Sequence[str], files: Sequence[Sequence[Path]]) -> list[dict[str, float]]:
    """Figures of the visual tokens of each answer, whose file is in `files` if it has an image."""
    places: dict[str, int] = {}  # copies of an image count as one
    own = torch.tensor([places.setdefault(target, len(places)) for target in targets])
    true = encode_files(session, list(places))
    drawn = [row for row, each in enumerate(files) if each]
    found: list[dict[str, float]] = [{"retrieval_at_1": 0.0} for _ in targets]
    if drawn:
        generated = torch.cat([load_tokens(files[row][0])[:1].float() for row in drawn])
        similar = cosines(generated, true)
        cosine = similar.gather(1, own[drawn, None]).squeeze(1)
        _add(found, drawn, "retrieval_at_1", (num_nearer(similar, cosine) == 0).float())
        _add(found, drawn, "cosine", cosine)
        if len(true) > 1:
            _add(found, drawn, "cosine_to_others", (similar.sum(dim=1) - cosine) / (len(true) - 1))
    rows = range(len(targets))
    _add(found, rows, "cosine_baseline", mean_cosine(best_constant(true[own]).expand_as(true), true)[own])
    if len(drawn) > 1:
        _add(found, drawn, "cosine_between_drawings", _mean_of_others(cosines(generated, generated)))
    if len(true) > 1:
        _add(found, rows, "cosine_between_targets", _mean_of_others(cosines(true, true))[own])
    return found


def _add(found: Sequence[dict[str, float]], rows: Sequence[int], name: str, values: Tensor) -> None:
    for row, value in zip(rows, values.tolist(), strict=True):
        found[row][name] = value


def _mean_of_others(similar: Tensor) -> Tensor:
    """Mean of each row of `[n, n]` without its diagonal, `[n]`."""
    return (similar.sum(dim=1) - similar.diagonal()) / (len(similar) - 1)


def _save_sheet(targets: Sequence[str], drawn: Sequence[Sequence[Path]], file: Path) -> None:
    """True images, each next to the drawing, or to white if there is none; evenly spread over the samples."""
    white = Image.new("RGB", (_SIDE, _SIDE), "white")
    cells: list[Image.Image] = []
    for number in spread(len(targets), _SHEET_COLUMNS * _SHEET_ROWS):
        true = to_pil_image(targets[number])
        cells.append(ImageOps.pad(true, (_SIDE, _SIDE), Image.Resampling.BICUBIC, color="white"))
        cells.append(load_image(drawn[number][0]) if drawn[number] else white)
    width = 2 * min(_SHEET_COLUMNS, len(cells) // 2)
    cells += [white] * (-len(cells) % width)
    rows = [cells[start : start + width] for start in range(0, len(cells), width)]
    image_grid(rows, side=_SIDE, labels=["true", "drawn"] * (width // 2), gap=2).save(file)
