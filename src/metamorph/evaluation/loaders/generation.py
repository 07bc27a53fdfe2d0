"""Prompts for images: GenEval, DPG-Bench, WISE, and files of captions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from metamorph.evaluation.loaders.base import Loader
from metamorph.evaluation.loaders.tables import Row, existing_file, find_files, read_rows
from metamorph.evaluation.metrics.geneval import COLORS, POSITIONS
from metamorph.evaluation.samples import Sample
from metamorph.flags.parser import unknown_choice


TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
"""Of GenEval."""
_DPG_COLUMNS = (
    "item_id",
    "text",
    "proposition_id",
    "dependency",
    "category_broad",
    "question_natural_language",
)
_WISE_COLUMNS = ("prompt_id", "Prompt", "Explanation", "Subcategory")
_WISE_SPACE_TIME = {"Longitudinal time": "time", "Horizontal time": "time"}
_WISE_RANGES = ((400, "cultural"), (700, "space"), (800, "biology"), (900, "physics"), (1000, "chemistry"))
"""Last `prompt_id` of each category; those of time are told from space by their subcategory."""


@dataclass(frozen=True)
class GenevalLoader(Loader):
    """GenEval's `evaluation_metadata.jsonl`, or a folder with it. Field: `prompt`; category: `task`."""

    name: ClassVar[str] = "geneval"

    def load(self, path: Path) -> Sequence[Sample]:
        """See `Loader.load`."""
        (file,) = find_files(path, "evaluation_metadata.jsonl")
        rows = read_rows(file, ("tag", "prompt", "include"))
        return [_geneval_sample(number, row) for number, row in enumerate(rows)]


@dataclass(frozen=True)
class DpgLoader(Loader):
    """DPG-Bench's `dpg_bench.csv`, or a folder with it: a row for each question. Field: `prompt`."""

    name: ClassVar[str] = "dpg"

    def load(self, path: Path) -> Sequence[Sample]:
        """See `Loader.load`."""
        (file,) = find_files(path, "dpg_bench.csv")
        prompts: dict[str, str] = {}
        questions: dict[str, list[dict[str, Any]]] = {}
        for row in read_rows(file, _DPG_COLUMNS):
            item = row.needed("item_id")
            prompts.setdefault(item, row.needed("text"))
            try:
                number = int(row.needed("proposition_id"))
                parents = [int(parent) for parent in row.needed("dependency").split(",")]
            except ValueError as error:
                raise row.error(f"proposition_id and dependency must be numbers ({error})") from error
            questions.setdefault(item, []).append(
                {
                    "id": number,
                    "text": row.needed("question_natural_language"),
                    "parents": [parent for parent in parents if parent],  # 0: none
                    "category": row.needed("category_broad"),
                }
            )
        for item, asked in questions.items():
            if unknown := {parent for each in asked for parent in each["parents"]} - {each["id"] for each in asked}:
                raise ValueError(f"{file}: a question of {item} depends on {min(unknown)}, which {item} does not have")
        return [Sample(item, {"prompt": prompt}, questions[item]) for item, prompt in prompts.items()]


@dataclass(frozen=True)
class WiseLoader(Loader):
    """A JSON file of WISE, or its folder `data` with all three. Field: `prompt`; categories: `area`, `subcategory`."""

    name: ClassVar[str] = "wise"

    def load(self, path: Path) -> Sequence[Sample]:
        """See `Loader.load`."""
        return [_wise_sample(row) for file in find_files(path, "*.json") for row in read_rows(file, _WISE_COLUMNS)]


@dataclass(frozen=True)
class CaptionsLoader(Loader):
    """Images with captions. Fields: `prompt`, the caption.

    Either JSON lines with `image` and `caption`, or COCO's captions (`captions_val2014.json`), of which the first of
    each image is taken. Images are beside the file, or in `image_folder`.
    """

    name: ClassVar[str] = "captions"
    image_folder: str | None = None
    """Relative to the file's folder."""

    def load(self, path: Path) -> Sequence[Sample]:
        """See `Loader.load`."""
        folder = path.parent / (self.image_folder or "")
        found = _coco_captions(path) if path.suffix == ".json" else _caption_lines(path)
        return [
            Sample(
                name,
                {"prompt": caption},
                {"caption": caption},
                files={"image": existing_file(image, folder, row.where)},
            )
            for name, row, image, caption in found
        ]


def _geneval_sample(number: int, row: Row) -> Sample:
    task = row.needed("tag")
    if task not in TASKS:
        raise row.error(f"tag {unknown_choice(task, TASKS)}")
    include, exclude = row.values["include"], row.values.get("exclude", [])
    if not isinstance(include, list) or not isinstance(exclude, list):
        raise row.error("include and exclude must be lists")
    for place, clause in enumerate(include):
        _check_clause(clause, place, row)
    for clause in exclude:
        _check_clause(clause, 0, row)
    return Sample(f"{number:05}", {"prompt": row.needed("prompt")}, dict(row.values), categories={"task": task})


def _check_clause(clause: Any, num_earlier: int, row: Row) -> None:
    """Raise a `ValueError` unless GenEval's metric can judge the clause, which follows `num_earlier` others."""
    match clause:
        case {"class": str(), "count": int()}:
            pass
        case _:
            raise row.error(f"{clause!r:.80} needs a class, a text, and a count, a number")
    if "color" in clause and clause["color"] not in COLORS:
        raise row.error(f"color {unknown_choice(str(clause['color']), COLORS)}")
    match clause.get("position"):
        case None:
            pass
        case [str(relation), int(place)] if relation in POSITIONS and 0 <= place < num_earlier:
            pass
        case other:
            raise row.error(
                f"position must be one of {', '.join(POSITIONS)} and the number of an earlier clause, from 0 on, "
                f"not {other!r:.80}"
            )


def _wise_sample(row: Row) -> Sample:
    number, prompt, subcategory = row.needed("prompt_id"), row.needed("Prompt"), row.needed("Subcategory")
    area = next((area for last, area in _WISE_RANGES if number.isdecimal() and 1 <= int(number) <= last), None)
    if area is None:
        raise row.error(f"prompt_id must be a number from 1 to 1000, not {number!r:.40}")
    if area == "space":
        area = _WISE_SPACE_TIME.get(subcategory, area)
    return Sample(
        number,
        {"prompt": prompt},
        {"prompt": prompt, "explanation": row.needed("Explanation")},
        categories={"area": area, "subcategory": subcategory},
    )


def _caption_lines(file: Path) -> Iterator[tuple[str, Row, str, str]]:
    for number, row in enumerate(read_rows(file, ("image", "caption"))):
        yield f"{number:06}", row, row.needed("image"), row.needed("caption")


def _coco_captions(file: Path) -> Iterator[tuple[str, Row, str, str]]:
    captions: dict[str, str] = {}
    for row in read_rows(file, ("image_id", "caption"), key="annotations"):
        captions.setdefault(row.needed("image_id"), row.needed("caption"))
    for row in read_rows(file, ("id", "file_name"), key="images"):
        name = row.needed("id")
        if name not in captions:
            raise row.error(f"image {name} has no caption")
        yield name, row, row.needed("file_name"), captions[name]
