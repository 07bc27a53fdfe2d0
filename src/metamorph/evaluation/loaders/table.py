"""Any table of questions: the spec says which column holds what."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from metamorph.evaluation.loaders.base import Loader
from metamorph.evaluation.loaders.choices import choice_reference, lettered, option_lines, options_in, parse_list
from metamorph.evaluation.loaders.tables import Row, as_text, find_files, image_reference, read_rows, video_files
from metamorph.evaluation.samples import Sample


FILE = "table_file"
"""A column that each table has: the name of its file, without the ending."""
_BRACES = re.compile(r"{([^{}]+)}")

Columns = str | Sequence[str]
"""One column or several."""


@dataclass(frozen=True)
class TableLoader(Loader):
    """Reads CSV, TSV, JSON, JSON Lines and parquet files.

    Fields for prompts: `question`, those of `fields` and, with options, `options` (lines such as `A. red`) and
    `options_in_parentheses` (`(A) red`).
    """

    name: ClassVar[str] = "table"
    question: str = "question"
    """Column of the question."""
    answer: str = "answer"
    """Column of the right answer: a text, or a list of texts of which each is right."""
    answer_is: Literal["letter", "text", "index"] = "letter"
    """How the right option is named: by its letter, its text, or its place from 0 on."""
    options: Columns = ()
    """One column with a list of the options, or a column for each."""
    options_in: str = ""
    """Instead of `options`, a column whose text has a line for each, such as `(A) red` or `A. red`. A row is an open
    question if its text has none, or if its right answer is none of their letters."""
    id: str = ""
    """Column that names a row; by default, rows are counted."""
    images: Columns = ()
    """Columns with paths, base64 or bytes of images, or with lists of them."""
    videos: Columns = ()
    """Columns with paths of videos."""
    media_folder: str | Mapping[str, str] = ""
    """Where paths start, relative to the folder of the data; or a folder for each `table_file`."""
    categories: Mapping[str, str] = field(default_factory=dict)
    """Kind of category → column."""
    fields: Mapping[str, str] = field(default_factory=dict)
    """Further names for the prompt → column, or a text with columns in braces, empty if one of these is empty."""
    only_rows_with: Columns = ()
    """Leave out rows in which one of these columns is empty."""
    only_rows_where: Mapping[str, Any] = field(default_factory=dict)
    """Column → value, or list of values; leave out rows with another one."""
    files: str = ""
    """If the data are a folder: which files, for example `data/test-*.parquet`."""
    key: str = ""
    """If a JSON file holds an object: the key of the list of rows."""

    def __post_init__(self) -> None:
        if self.options and self.options_in:
            raise ValueError("give options or options_in, not both")

    def load(self, path: Path) -> Sequence[Sample]:
        """The samples in the file or folder `path`."""
        if path.is_dir() and not self.files:
            raise ValueError(f"{path} is a folder: name its tables by files, for example files: data/test-*.parquet")
        files = find_files(path, self.files)
        folder = path if path.is_dir() else path.parent
        samples = [sample for file in files for sample in self._samples(file, folder, len(files) > 1)]
        if not samples:
            raise ValueError(f"only_rows_with and only_rows_where leave no row of {path}")
        return samples

    def _samples(self, file: Path, folder: Path, several: bool) -> Iterator[Sample]:
        seen: set[str] = set()
        needed = [name for name in self._columns() if name != FILE]
        for number, found in enumerate(read_rows(file, needed, key=self.key), start=1):
            row = Row(found.where, {FILE: file.stem, **found.values})
            if not self._is_wanted(row):
                continue
            id_ = row.needed(self.id) if self.id else str(number)
            if id_ in seen:
                raise row.error(f"another row has the same {self.id}, {id_!r}: take another column for id, or none")
            seen.add(id_)
            yield self._sample(f"{file.stem}-{id_}" if several else id_, row, folder)

    def _columns(self) -> list[str]:
        """All columns that the spec names, in its order."""
        names = [self.id, self.question, self.answer, *_each(self.options), self.options_in]
        names += [*_each(self.images), *_each(self.videos), *self.categories.values()]
        names += [column for text in self.fields.values() for column in _BRACES.findall(text) or [text]]
        return list(dict.fromkeys(filter(None, [*names, *_each(self.only_rows_with), *self.only_rows_where])))

    def _is_wanted(self, row: Row) -> bool:
        return all(row.text(column) for column in _each(self.only_rows_with)) and all(
            row.text(column) in map(str, value if isinstance(value, list) else [value])
            for column, value in self.only_rows_where.items()
        )

    def _sample(self, id_: str, row: Row, folder: Path) -> Sample:
        fields = {"question": row.needed(self.question)}
        fields |= {name: _filled(text, row) for name, text in self.fields.items()}
        options = self._options(row)
        if self.options:
            fields["options"] = option_lines(options)
            fields["options_in_parentheses"] = "\n".join(f"({letter}) {text}" for letter, text in options.items())
        media = folder / self._media_folder(row)
        return Sample(
            id=id_,
            fields=fields,
            reference=self._reference(row, options),
            images=tuple(
                image for name in _each(self.images) for image in image_reference(row.values[name], media, row.where)
            ),
            videos=tuple(
                video for name in _each(self.videos) for video in video_files(row.values[name], media, row.where)
            ),
            categories={kind: row.needed(column) for kind, column in self.categories.items()},
        )

    def _media_folder(self, row: Row) -> str:
        if isinstance(self.media_folder, str):
            return self.media_folder
        if row.text(FILE) not in self.media_folder:
            raise row.error(
                f"media_folder names no folder for {row.text(FILE)}, only for {', '.join(self.media_folder)}"
            )
        return self.media_folder[row.text(FILE)]

    def _options(self, row: Row) -> dict[str, str]:
        if self.options_in:
            return options_in(row.needed(self.options_in))
        columns = _each(self.options)
        if len(columns) == 1:
            return lettered(parse_list(row.values[columns[0]], row, columns[0]))
        return lettered([row.text(column) for column in columns])

    def _reference(self, row: Row, options: Mapping[str, str]) -> Any:
        """What the metric compares with: for questions with options a mapping, else the right text or texts."""
        value = row.values[self.answer]
        right = [as_text(each) for each in value] if isinstance(value, (list, tuple)) else row.needed(self.answer)
        if self.options_in and right not in options:
            return {"answer": right, "options": {}}
        if not options:
            return right
        letters = list(options)
        if self.answer_is == "text":
            found = [letter for letter, text in options.items() if text == right]
            if len(found) != 1:
                raise row.error(f"the right answer {right!r} is the text of {len(found)} of the options")
            return choice_reference(options, found[0], row)
        if self.answer_is == "index":
            if not str(right).isdecimal() or int(str(right)) >= len(letters):
                raise row.error(f"the right answer must be from 0 to {len(letters) - 1}, not {right!r}")
            return choice_reference(options, letters[int(str(right))], row)
        return choice_reference(options, str(right).strip("()").upper(), row)


def _each(columns: Columns) -> Sequence[str]:
    return [columns] if isinstance(columns, str) else columns


def _filled(text: str, row: Row) -> str:
    """The value of a column, or a text with the values of the columns in braces."""
    columns = _BRACES.findall(text)
    if not columns:
        return row.text(text)
    return _BRACES.sub(lambda match: row.text(match[1]), text) if all(map(row.text, columns)) else ""
