"""Rows of tables (CSV, TSV, JSON, JSON Lines, parquet), and the images and videos that they name or contain."""

import base64
import binascii
import csv
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from metamorph.data.media.stores import FolderStore
from metamorph.flags.extras import install_command
from metamorph.models.image_files import MediaError


_MAX_FIELD = 2**30
"""Characters of a field of CSV and TSV files, which may be an image in base64; Python's own limit is 131,072."""
_MAX_PATH = 4096
"""Characters of a path; a longer text can only be an image in base64."""
_ROWS_AT_ONCE = 64
"""Rows of a parquet file in memory, which may contain images."""


class Row(NamedTuple):
    """A row of a table."""

    where: str
    """For error messages."""
    values: Mapping[str, Any]

    def text(self, column: str) -> str:
        """A value as text; empty if there is none."""
        return as_text(self.values.get(column))

    def needed(self, column: str) -> str:
        """A value as text, which must not be empty."""
        if text := self.text(column):
            return text
        raise ValueError(f"{self.where}: the column {column!r} is empty")

    def error(self, message: str) -> ValueError:
        """A `ValueError` that says where the row is."""
        return ValueError(f"{self.where}: {message}")


def as_text(value: Any) -> str:
    """A value as text; empty for None and NaN, which JSON and parquet files have in empty cells."""
    return "" if value is None or value != value else str(value).strip()


def find_files(path: Path, pattern: str) -> list[Path]:
    """The files in the folder `path` that match `pattern`, by name, or `path` itself if it is a file.

    Raises:
        ValueError: If there are none.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"there is no file or folder {path}")
    files = sorted(file for file in path.glob(pattern) if file.is_file())
    if not files:
        raise ValueError(f"{path} is expected to have files {pattern}, but it has {_contents(path)}")
    return files


def read_rows(file: Path, needed: Collection[str], optional: Collection[str] = (), key: str = "") -> Iterator[Row]:
    """The rows of a file, whose ending says what it is. `.json` is a list of objects, in the object's `key` if there is
    one, or JSON Lines. Columns that are neither `needed` nor `optional` may be left out.

    Raises:
        ValueError: If it cannot be read, has no rows, or lacks a needed column, with the columns found and expected.
        ModuleNotFoundError: If it is parquet and pyarrow is not installed.
    """
    if not file.is_file():
        raise ValueError(f"there is no file {file}")
    ending = file.suffix.lower()
    if ending == ".parquet":
        rows = _parquet(file, needed, optional)
    elif ending in (".csv", ".tsv"):
        rows = _separated(file, "," if ending == ".csv" else "\t")
    elif ending in (".json", ".jsonl"):
        rows = _json(file, key)
    else:
        raise ValueError(f"{file} is not a table: expected .csv, .tsv, .json, .jsonl or .parquet")
    number = 0
    for number, values in enumerate(rows, start=1):
        row = Row(f"{file}, row {number}", values)
        check_columns(row.where, values, needed)
        yield row
    if not number:
        raise ValueError(f"{file} has no rows; expected columns: {', '.join(needed)}")


def check_columns(where: str, found: Collection[str], needed: Collection[str]) -> None:
    """Raise a `ValueError` that names the columns found and expected if a needed one is missing."""
    if missing := [name for name in needed if name not in found]:
        raise ValueError(
            f"{where} has no column {', '.join(map(repr, missing))}; expected columns: {', '.join(needed)}; "
            f"found: {', '.join(map(str, found))}"
        )


def image_reference(value: Any, folder: Path, where: str) -> list[str]:
    """The images of a cell, each as an absolute path or a data URL.

    A cell holds the path of a file in `folder`, the content of a file as bytes or in base64, the `{"bytes", "path"}` of
    the Hugging Face Hub's parquet files, or a list of these.

    Raises:
        ValueError: If it holds none of them, or there is no such file.
    """
    if isinstance(value, (list, tuple)):
        return [reference for each in value for reference in image_reference(each, folder, where)]
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return [f"data:;base64,{base64.b64encode(value).decode()}"]
    if not isinstance(value, str) or not value:
        raise ValueError(f"{where}: {value!r:.60} is not an image: expected a path, base64 or bytes")
    if value.startswith("data:"):
        return [value]
    if len(value) <= _MAX_PATH and (file := _existing(value, folder, where)):
        return [file]
    text = "".join(value.split())
    if _is_base64(text):
        return [f"data:;base64,{text}"]
    raise ValueError(f"{where}: there is no file {value[:200]} in {folder}, and the text is not an image in base64")


def video_files(value: Any, folder: Path, where: str) -> list[str]:
    """The videos of a cell, one path in `folder` or several, as absolute paths; a `ValueError` if one is missing."""
    return [
        existing_file(each, folder, where, "video") for each in (value if isinstance(value, (list, tuple)) else [value])
    ]


def existing_file(path: Any, folder: Path, where: str, kind: str = "file") -> str:
    """The absolute path of a file in a folder, which relative paths may not leave; a `ValueError` if there is none."""
    file = _existing(path, folder, where) if isinstance(path, str) else None
    if file is None:
        raise ValueError(f"{where}: there is no {kind} {path!r:.200} in {folder}")
    return file


def _existing(path: str, folder: Path, where: str) -> str | None:
    """The absolute path of a file in a folder, which relative paths may not leave; None if there is none."""
    store = FolderStore(folder)
    try:
        return str(store.open(path).absolute()) if store.exists(path) else None
    except MediaError as error:
        raise ValueError(f"{where}: {error}") from error


def _is_base64(text: str) -> bool:
    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return False
    return len(content) > 32  # a shorter text is a name; no image is so small


def _contents(folder: Path) -> str:
    names = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") or "nothing in it"


def _separated(file: Path, delimiter: str) -> Iterator[Mapping[str, Any]]:
    csv.field_size_limit(_MAX_FIELD)
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
            names = reader.fieldnames or ()
            if repeated := [name for name in dict.fromkeys(filter(None, names)) if names.count(name) > 1]:
                raise ValueError(f"{file} has two columns named {repeated[0]!r}: rename or remove one of them")
            for number, values in enumerate(reader, start=1):
                if None in values:
                    raise ValueError(f"{file}, row {number} has more values than the first line has columns")
                yield values
    except csv.Error as error:
        raise ValueError(f"{file}, after line {reader.line_num}, is not a table ({error})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} cannot be read ({error}): expected a table in UTF-8") from error


def _json(file: Path, key: str) -> Iterator[Mapping[str, Any]]:
    try:
        text = file.read_text(encoding="utf-8-sig")
        rows = _json_lines(text) if file.suffix.lower() == ".jsonl" else _json_list(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON in UTF-8 ({error})") from error
    if isinstance(rows, dict) and key in rows:
        rows = rows[key]
    if not isinstance(rows, list):
        place = f"a list in the key {key!r} of an object" if key else "a list of objects"
        found = f"an object with the keys {', '.join(rows)}" if isinstance(rows, dict) else type(rows).__name__
        raise ValueError(f"{file} must hold {place}, not {found}")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"{file}, row {number} must be an object, not {row!r:.60}")
        yield row


def _json_list(text: str) -> Any:
    """The JSON value of a text, which may also be JSON Lines, as POPE's `.json` files are."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return _json_lines(text)
        raise


def _json_lines(text: str) -> list[Any]:
    # Not splitlines, which also splits at characters that JSON allows in a text, such as U+2028.
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def _parquet(file: Path, needed: Collection[str], optional: Collection[str]) -> Iterator[Mapping[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{file} needs pyarrow: {install_command('evaluate')}", name=error.name) from error
    try:
        with parquet.ParquetFile(file) as table:
            found: Sequence[str] = table.schema_arrow.names
            check_columns(str(file), found, needed)
            columns = [name for name in found if name in needed or name in optional]
            for batch in table.iter_batches(batch_size=_ROWS_AT_ONCE, columns=columns):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file} cannot be read as parquet ({error})") from error
