"""MMBench: its TSV files, with images in base64 and each question once more for each rotation of its options.

Columns and rotations (rows whose index is that of the question plus a multiple of a million, and whose image may be the
question's index) are those of the files at https://github.com/open-compass/MMBench and of VLMEvalKit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from metamorph.evaluation.loaders.base import Loader
from metamorph.evaluation.loaders.choices import choice_reference, lettered, option_lines
from metamorph.evaluation.loaders.tables import Row, image_reference, read_rows
from metamorph.evaluation.samples import Sample


COLUMNS = ("index", "question", "answer", "A", "B", "image")
OPTIONAL = ("C", "D", "E", "hint", "category", "l2-category")
_COPY = 1_000_000
"""What is added to a question's index for a rotation."""
_MAX_INDEX = 64
"""Characters of an image's text that is the index of a row with the image, as in VLMEvalKit."""


@dataclass(frozen=True)
class MMBenchLoader(Loader):
    """Reads a TSV file of MMBench; each question is followed by its rotations.

    Fields for prompts: `question`, `options`, and `hint`, with the end of its line, or empty.
    """

    name: ClassVar[str] = "mmbench"
    circular: bool = True
    """Ask for each rotation of the options: those of the file, or made if the file has none."""

    def load(self, path: Path) -> Sequence[Sample]:
        """The samples of the file `path`."""
        rows = _rows(path)
        has_copies = any(index >= _COPY for index in rows)
        samples = []
        for index, row in rows.items():
            if index >= _COPY:
                if index % _COPY not in rows:
                    raise row.error(f"this is a rotation of the question {index % _COPY}, which the file lacks")
                continue
            group = [(str(index), row, _options(row), row.needed("answer").upper())]
            if self.circular and has_copies:
                copies = [rows[key] for key in range(index + _COPY, index + 26 * _COPY, _COPY) if key in rows]
                group += [(row.text("index"), row, _options(row), row.needed("answer").upper()) for row in copies]
            elif self.circular:
                group += _rotations(*group[0])
            samples += [_sample(*each, rows, str(index)) for each in group]
        return samples


def _rows(path: Path) -> dict[int, Row]:
    """The rows of a file by their index."""
    rows: dict[int, Row] = {}
    for found in read_rows(path, COLUMNS, OPTIONAL):
        # pandas, with which the file is published and read, writes "nan" for an empty cell.
        row = Row(found.where, {name: value for name, value in found.values.items() if value != "nan"})
        index = _index(row)
        if index in rows:
            raise row.error(f"another row has the same index, {index}")
        rows[index] = row
    return rows


def _index(row: Row) -> int:
    text = row.needed("index")
    if not text.isdecimal():
        raise row.error(f"the index must be a number, not {text!r:.40}")
    return int(text)


def _options(row: Row) -> dict[str, str]:
    return lettered([row.text(letter) for letter in "ABCDE"])


def _rotations(id_: str, row: Row, options: dict[str, str], answer: str) -> list[tuple[str, Row, dict[str, str], str]]:
    """The question with its options moved by one place, two places, …"""
    letters, texts = list(options), list(options.values())
    choice_reference(options, answer, row)
    place, count = letters.index(answer), len(texts)
    return [
        (f"{id_}+{shift}", row, dict(zip(letters, texts[shift:] + texts[:shift], strict=True)), letters[place - shift])
        for shift in range(1, count)
    ]


def _sample(id_: str, row: Row, options: dict[str, str], answer: str, rows: dict[int, Row], group: str) -> Sample:
    image = row.needed("image")
    if len(image) <= _MAX_INDEX:
        if not image.isdecimal() or int(image) not in rows:
            raise row.error(f"the image must be base64, or the index of another row, not {image!r}")
        image = rows[int(image)].needed("image")
    hint = row.text("hint")
    fields = {
        "question": row.needed("question"),
        "hint": f"{hint}\n" if hint else "",
        "options": option_lines(options),
    }
    return Sample(
        id=id_,
        fields=fields,
        reference=choice_reference(options, answer, row) | {"group": group},
        images=tuple(image_reference(image, Path(), row.where)),
        categories={name: row.text(name) for name in ("category", "l2-category") if row.text(name)},
    )
