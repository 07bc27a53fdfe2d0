"""MMMU: parquet files with up to seven images for each question, as at https://huggingface.co/datasets/MMMU/MMMU."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from metamorph.evaluation.loaders.base import Loader
from metamorph.evaluation.loaders.choices import LETTER, SHORT, choice_reference, lettered, option_lines, parse_list
from metamorph.evaluation.loaders.tables import Row, find_files, image_reference, read_rows
from metamorph.evaluation.samples import Sample
from metamorph.models.sequence.constants import DEFAULT_IMAGE_TOKEN


IMAGES = tuple(f"image_{number}" for number in range(1, 8))
COLUMNS = ("id", "question", "options", "answer", "question_type", "image_1")
_MARKER = re.compile(r"<image (\d)>")
_SUBJECT = re.compile(r"[a-z]+_(.+)_\d+")


@dataclass(frozen=True)
class MMMULoader(Loader):
    """Reads a folder with a folder for each subject, the merged files of `lmms-lab/MMMU`, or one file.

    Fields for prompts: `question`, with a marker where each image belongs; `options`, followed by an empty line, or
    empty for open questions; `instruction`, which asks for a letter or for a word.
    """

    name: ClassVar[str] = "mmmu"
    split: Literal["dev", "validation"] = "validation"
    """The answers of the third one, `test`, are not public."""

    def load(self, path: Path) -> Sequence[Sample]:
        """The samples in `path`."""
        files = find_files(path, f"**/{self.split}-*.parquet")
        return [_sample(row) for file in files for row in read_rows(file, COLUMNS, (*IMAGES, "subfield"))]


def _sample(row: Row) -> Sample:
    id_, question, answer = row.needed("id"), row.needed("question"), row.needed("answer")
    kind, subject = row.needed("question_type"), _SUBJECT.fullmatch(id_)
    if kind not in ("multiple-choice", "open") or subject is None:
        raise row.error(
            "expected an id such as validation_Art_1 and the question_type multiple-choice or open, "
            f"not {id_!r} and {kind!r}"
        )
    categories = {"subject": subject[1], "type": kind}
    if row.text("subfield"):
        categories["subfield"] = row.text("subfield")
    reference: dict[str, Any]
    if kind == "open":
        options = ""
        right = parse_list(answer, row, "answer") if answer.startswith("[") else [answer]
        reference = {"answer": right, "options": {}}
    else:
        texts = lettered(parse_list(row.values["options"], row, "options"))
        options = f"{option_lines(texts)}\n"
        reference = choice_reference(texts, answer, row)
    if _MARKER.search(question + options) is None:
        question = f"<image 1>\n{question}"
    images = [f"image_{number}" for number in _MARKER.findall(question + options)]
    if missing := [name for name in images if row.values.get(name) is None]:
        raise row.error(f"the question shows {missing[0]}, but the row has no such image")
    return Sample(
        id=id_,
        fields={
            "question": _MARKER.sub(DEFAULT_IMAGE_TOKEN, question),
            "options": _MARKER.sub(DEFAULT_IMAGE_TOKEN, options),
            "instruction": SHORT if kind == "open" else LETTER,
        },
        reference=reference,
        images=tuple(image for name in images for image in image_reference(row.values[name], Path(), row.where)),
        categories=categories,
    )
