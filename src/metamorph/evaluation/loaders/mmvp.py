"""MMVP: `Questions.csv` and the folder `MMVP Images`, as at https://huggingface.co/datasets/MMVP/MMVP."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from metamorph.evaluation.loaders.base import Loader
from metamorph.evaluation.loaders.choices import choice_reference, lettered, option_lines
from metamorph.evaluation.loaders.tables import Row, check_columns, image_reference, read_rows
from metamorph.evaluation.samples import Sample


COLUMNS = ("Index", "Question", "Options", "Correct Answer")
_OPTIONS = re.compile(r"\(a\)(.*)\(b\)(.*)", re.IGNORECASE | re.DOTALL)
_ANSWER = re.compile(r"\(?([ab])\)?", re.IGNORECASE)


@dataclass(frozen=True)
class MMVPLoader(Loader):
    """Reads the folder of MMVP. Questions 1 and 2 are a pair, 3 and 4, …; fields for prompts: `question`, `options`."""

    name: ClassVar[str] = "mmvp"

    def load(self, path: Path) -> Sequence[Sample]:
        """The samples of the folder `path`."""
        file = path / "Questions.csv"
        return [_sample(row, path / "MMVP Images") for row in read_rows(file, COLUMNS[1:])]


def _sample(row: Row, images: Path) -> Sample:
    # Some copies of the file have a small L in the first column's name.
    row = Row(row.where, {("Index" if name == "lndex" else name): value for name, value in row.values.items()})
    check_columns(row.where, row.values, COLUMNS)
    index, options = row.needed("Index"), _OPTIONS.fullmatch(row.needed("Options"))
    answer = _ANSWER.fullmatch(row.needed("Correct Answer"))
    if not index.isdecimal() or options is None or answer is None:
        raise row.error(
            "expected a number, options such as '(a) Open (b) Closed' and an answer such as '(a)', "
            f"not {index!r}, {row.text('Options')!r} and {row.text('Correct Answer')!r}"
        )
    texts = lettered([option.strip() for option in options.groups()])
    reference = choice_reference(texts, answer[1].upper(), row)
    return Sample(
        id=index,
        fields={"question": row.needed("Question"), "options": option_lines(texts)},
        reference=reference | {"group": str((int(index) - 1) // 2 + 1)},
        images=tuple(image_reference(f"{index}.jpg", images, row.where)),
    )
