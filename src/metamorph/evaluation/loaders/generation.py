"""Prompts for images: GenEval, DPG-Bench, WISE, and files of captions."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from metamorph.evaluation.loaders.base import Loader
from metamorph.evaluation.samples import Sample
from metamorph.flags.parser import unknown_choice


TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
"""Of GenEval."""
_WISE_SPACE_TIME = {"Longitudinal time": "time", "Horizontal time": "time"}
_WISE_RANGES = ((400, "cultural"), (700, "space"), (800, "biology"), (900, "physics"), (1000, "chemistry"))
"""Last `prompt_id` of each category; those of time are told from space by their subcategory."""


@dataclass(frozen=True)
class GenevalLoader(Loader):
    """GenEval's `evaluation_metadata.jsonl`, or a folder with it. Field: `prompt`; category: `task`."""

    name: ClassVar[str] = "geneval"

    def load(self, path: Path) -> Sequence[Sample]:
        """See `Loader.load`."""
        samples: list[Sample] = []
        for where, record in read_lines(file_in(path, "evaluation_metadata.jsonl")):
            need(record, {"tag": str, "prompt": str, "include": list}, where)
            if record["tag"] not in TASKS:
                raise ValueError(f"{where}: tag {unknown_choice(record['tag'], TASKS)}")
            for clause in (*record["include"], *record.get("exclude", ())):
                need(clause, {"class": str, "count": int}, where)
            samples.append(
                Sample(f"{len(samples):05}", {"prompt": record["prompt"]}, record, categories={"task": record["tag"]})
            )
        return samples


@dataclass(frozen=True)
class DpgLoader(Loader):
    """DPG-Bench's `dpg_bench.csv`, or a folder with it: a row for each question. Field: `prompt`."""

    name: ClassVar[str] = "dpg"

    def load(self, path: Path) -> Sequence[Sample]:
        """See `Loader.load`."""
        file = file_in(path, "dpg_bench.csv")
        prompts: dict[str, str] = {}
        questions: dict[str, list[dict[str, Any]]] = {}
        with file.open(encoding="utf-8-sig", newline="") as opened:
            for row in csv.DictReader(opened):
                where = f"{file}, question {sum(map(len, questions.values())) + 1}"
                columns = (
                    "item_id",
                    "text",
                    "proposition_id",
                    "dependency",
                    "category_broad",
                    "question_natural_language",
                )
                need(row, dict.fromkeys(columns, str), where)
                item = row["item_id"]
                prompts.setdefault(item, row["text"])
                try:
                    number = int(row["proposition_id"])
                    parents = [int(parent) for parent in row["dependency"].split(",")]
                except ValueError as error:
                    raise ValueError(f"{where}: proposition_id and dependency must be numbers ({error})") from error
                questions.setdefault(item, []).append(
                    {
                        "id": number,
                        "text": row["question_natural_language"],
                        "parents": [parent for parent in parents if parent],  # 0: none
                        "category": row["category_broad"],
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
        samples = []
        for file in sorted(path.glob("*.json")) if path.is_dir() else [path]:
            records = _read_json(file)
            if not isinstance(records, list):
                raise ValueError(f"{file} must be a list of prompts")
            for number, record in enumerate(records, start=1):
                where = f"{file}, prompt {number}"
                need(record, {"prompt_id": int, "Prompt": str, "Explanation": str, "Subcategory": str}, where)
                samples.append(
                    Sample(
                        str(record["prompt_id"]),
                        {"prompt": record["Prompt"]},
                        {"prompt": record["Prompt"], "explanation": record["Explanation"]},
                        categories={"area": _wise_area(record, where), "subcategory": record["Subcategory"]},
                    )
                )
        if not samples:
            raise ValueError(f"{path} has no *.json: give WISE's folder data, or one of its files")
        return samples


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
        pairs = _coco_captions(path) if path.suffix == ".json" else _caption_lines(path)
        return [
            Sample(name, {"prompt": caption}, {"caption": caption}, files={"image": existing(folder / image, path)})
            for name, image, caption in pairs
        ]


def read_lines(file: Path) -> list[tuple[str, Any]]:
    """The JSON values of a file's lines, each with the place for error messages."""
    found = []
    with file.open(encoding="utf-8-sig") as opened:
        for number, line in enumerate(opened, start=1):
            if line.strip():
                where = f"{file}, line {number}"
                try:
                    found.append((where, json.loads(line)))
                except ValueError as error:
                    raise ValueError(f"{where} is not JSON: {error}") from error
    return found


def need(record: Any, fields: Mapping[str, type], where: str) -> None:
    """Raise a `ValueError` that names the place and the fields unless `record` is a mapping with these fields."""
    for name, kind in fields.items():
        if not isinstance(record, Mapping) or not isinstance(record.get(name), kind):
            raise ValueError(f"{where}: {name} is missing or not of type {kind.__name__}; it needs {', '.join(fields)}")


def file_in(path: Path, name: str) -> Path:
    """The file `path`, or that of this name in the folder `path`; a `ValueError` if there is none."""
    file = path / name if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{path} has no {name}")
    return file


def existing(file: Path, named_in: Path) -> str:
    """The absolute path of a file; a `FileNotFoundError` that says where it was named if there is none."""
    if not file.is_file():
        raise FileNotFoundError(f"{named_in} names {file}, which does not exist")
    return str(file.absolute())


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error


def _wise_area(record: Mapping[str, Any], where: str) -> str:
    area = next((area for last, area in _WISE_RANGES if 1 <= record["prompt_id"] <= last), None)
    if area is None:
        raise ValueError(f"{where}: prompt_id {record['prompt_id']} is not from 1 to 1000")
    return _WISE_SPACE_TIME.get(record["Subcategory"], area) if area == "space" else area


def _caption_lines(file: Path) -> list[tuple[str, str, str]]:
    found: list[tuple[str, str, str]] = []
    for where, record in read_lines(file):
        need(record, {"image": str, "caption": str}, where)
        found.append((f"{len(found):06}", record["image"], record["caption"]))
    return found


def _coco_captions(file: Path) -> list[tuple[str, str, str]]:
    content = _read_json(file)
    need(content, {"images": list, "annotations": list}, str(file))
    captions: dict[int, str] = {}
    for annotation in content["annotations"]:
        need(annotation, {"image_id": int, "caption": str}, f"{file}, annotations")
        captions.setdefault(annotation["image_id"], annotation["caption"])
    found = []
    for image in content["images"]:
        need(image, {"id": int, "file_name": str}, f"{file}, images")
        if image["id"] not in captions:
            raise ValueError(f"{file}: image {image['id']} has no caption")
        found.append((str(image["id"]), image["file_name"], captions[image["id"]]))
    return found
