"""Files of records with random access: JSON Lines by byte offset, and JSON arrays."""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from metamorph.data.records import DataError, RecordError


@dataclass(frozen=True)
class RawRecord:
    """A record as JSON, and its place."""

    where: str
    """File and line (or index)."""
    value: Any
    """Result of parsing the JSON text."""


class Source(Protocol):
    """A sequence of raw records."""

    path: Path

    @property
    def broken(self) -> Sequence[tuple[int, RecordError]]:
        """Index and error of each record that is not JSON."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> RawRecord:
        """Read one record.

        Raises:
            RecordError: If it is not JSON.
        """


def open_source(path: str | os.PathLike[str]) -> Source:
    """Open a file of records; whether it is a JSON array or JSON Lines shows in its first character.

    Raises:
        DataError: If there is no such file, it holds no records, or an array is not JSON.
    """
    path = Path(path)
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "does not exist"
        raise DataError(f"--data_path {path} {found}; give a .json or .jsonl file of LLaVA records")
    with path.open("rb") as file:
        start = file.read(4096).removeprefix(_BOM).lstrip()[:1]
    source: Source = JsonArraySource(path) if start == b"[" else JsonlSource(path)
    if len(source) == 0:
        raise DataError(f"--data_path {path} holds no records")
    return source


class JsonlSource:
    """JSON Lines: one record on each line, blank lines ignored.

    All lines are parsed once when the file is opened, so that broken ones are known before training starts; after
    that only byte offsets are kept, and records are read from disk when they are asked for.

    Args:
        path: The file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.broken: list[tuple[int, RecordError]] = []
        self._file: int | None = None
        offsets, lengths, lines = array("Q"), array("Q"), array("Q")
        offset = 0
        size = self.path.stat().st_size
        with (
            self.path.open("rb") as file,
            tqdm(total=size, desc=f"Reading {self.path.name}", unit="B", unit_scale=True, delay=2, disable=None) as bar,
        ):
            for number, line in enumerate(file, 1):
                if line.strip(_BLANK):
                    offsets.append(offset)
                    lengths.append(len(line))
                    lines.append(number)
                    self._check(line, number, index=len(offsets) - 1)
                offset += len(line)
                bar.update(len(line))
        self._offsets, self._lengths, self._lines = (
            np.frombuffer(values, dtype=np.uint64) if values else np.zeros(0, dtype=np.uint64)
            for values in (offsets, lengths, lines)
        )

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> RawRecord:
        """Read one record; see [`Source`]. Safe in threads and in forked workers: reads share no position."""
        if self._file is None:
            self._file = os.open(self.path, os.O_RDONLY)
        line = os.pread(self._file, int(self._lengths[index]), int(self._offsets[index]))
        number = int(self._lines[index])
        return RawRecord(self._where(number), _parse_line(line, self._where(number)))

    def __getstate__(self) -> dict[str, Any]:
        """Copies of the source (in spawned workers) open the file for themselves."""
        return {**self.__dict__, "_file": None}

    def __del__(self) -> None:
        file = getattr(self, "_file", None)  # absent if the constructor failed
        if file is not None:
            os.close(file)

    def _check(self, line: bytes, number: int, index: int) -> None:
        try:
            _parse_line(line, self._where(number))
        except RecordError as error:
            self.broken.append((index, error))

    def _where(self, number: int) -> str:
        return f"{self.path}:{number}"


class JsonArraySource:
    """A JSON array of records, held in memory as a whole. Large data is better kept as JSON Lines.

    Raises:
        DataError: If the file is not a JSON array.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.broken: list[tuple[int, RecordError]] = []
        try:
            records = json.loads(self.path.read_bytes().removeprefix(_BOM))
        except json.JSONDecodeError as error:
            raise DataError(
                f"{self.path}:{error.lineno}:{error.colno}: not valid JSON ({error.msg}); correct the file, or keep "
                "one record on each line (.jsonl)"
            ) from error
        except UnicodeDecodeError as error:
            raise DataError(f"{self.path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
        if not isinstance(records, list):
            raise DataError(f"{self.path}: the file must hold a JSON array of records, not {type(records).__name__}")
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> RawRecord:
        """Return one record; see [`Source`]."""
        return RawRecord(f"{self.path}[{index}]", self._records[index])


_BOM = b"\xef\xbb\xbf"
_BLANK = b" \t\r\n\xef\xbb\xbf"


def _parse_line(line: bytes, where: str) -> Any:
    try:
        return json.loads(line.removeprefix(_BOM))
    except json.JSONDecodeError as error:
        raise RecordError.at(
            where,
            "broken_line",
            f"the line is not valid JSON ({error.msg} at column {error.colno}: {line[:60]!r}); correct or remove it",
        ) from error
    except UnicodeDecodeError as error:
        raise RecordError.at(
            where, "broken_line", f"the line is not UTF-8 text ({error.reason} at byte {error.start})"
        ) from error
