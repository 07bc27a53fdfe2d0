"""JSON Lines and JSON arrays with random access: only offsets are kept, and a record is read when it is needed."""

from __future__ import annotations

import json
import os
import re
from array import array
from pathlib import Path

import numpy as np

from metamorph.data.records import (
    BYTE_ORDER_MARK,
    MAX_RECORD_BYTES,
    DataError,
    RawRecord,
    check_length,
    parse_json,
)
from metamorph.data.sources.index import index_files
from metamorph.runs.progress import Progress


CHUNK_BYTES = 8 * 2**20
"""Bytes read at a time while a file is scanned."""
_SPACE = b" \t\r\n"
_SIGN = re.compile(r"[^ \t\r\n]")
_MARGIN = 16
"""A value that ends this close to the end of the text, or a fault there, may only be cut off: `-1e` is read as -1."""


class JsonlSource:
    """JSON Lines: one record on each line, blank lines ignored."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.index = index_files([self.path], "lines", lambda: scan_lines(self.path))

    def __len__(self) -> int:
        return len(self.index["offsets"]) - 1

    def __getitem__(self, index: int) -> RawRecord:
        """Read one record; see [`metamorph.data.sources.open.Source`]."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path} has no record {index}: it has {len(self)}")
        where, start, end = self._locate(index)
        check_length(end - start, where)
        return RawRecord(where, parse_json(self.index.read(start, end).rstrip(_SPACE), where))

    def _locate(self, index: int) -> tuple[str, int, int]:
        number = int(self.index["lines"][index]) if "lines" in self.index else index + 1
        return f"{self.path}:{number}", *self.index["offsets"][index : index + 2].tolist()


class JsonArraySource(JsonlSource):
    """A JSON array of records.

    Raises:
        DataError: If the file is not a JSON array.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.index = index_files([self.path], "array", lambda: scan_array(self.path))

    def __len__(self) -> int:
        return len(self.index["spans"]) - 1

    def _locate(self, index: int) -> tuple[str, int, int]:
        return f"{self.path}[{index}]", *self.index["spans"][index + 1].tolist()


def scan_lines(path: Path) -> dict[str, np.ndarray]:
    """Find the lines of a file that are not blank.

    Returns:
        `offsets` uint64 `[records + 1]`: where each record begins, and the size of the file. Blank lines between two
        records count as the end of the first. Only if there are such lines, `lines` uint64 `[records]`: the numbers
        of the records' lines, from 1.
    """
    starts, is_record = array("Q", [0]), array("B", [False])  # of each line
    offset = 0
    buffer = bytearray(CHUNK_BYTES + 1)
    with path.open("rb", buffering=0) as file, _progress(path, path.stat().st_size) as bar:
        while count := file.readinto(memoryview(buffer)[:-1]):
            if offset == 0:
                starts[0] = _mark_length(buffer)
                buffer[: starts[0]] = b" " * starts[0]
            buffer[count] = ord(" ")  # so that there is something after the last end of line
            chunk = np.frombuffer(buffer, dtype=np.uint8, count=count + 1)
            begins = np.append(0, np.flatnonzero(chunk == ord("\n")) + 1)
            ends = np.append(begins[1:], count)
            has_text = ~np.isin(chunk[begins], list(_SPACE))
            for place in np.flatnonzero(~has_text):  # few lines begin with white space
                has_text[place] = bool(buffer[begins[place] : ends[place]].strip(_SPACE))
            is_record[-1] |= has_text[0]  # the line of the previous chunk continues
            starts.frombytes((ends[:-1] + offset).astype(np.uint64).tobytes())
            is_record.frombytes(has_text[1:].tobytes())
            offset += count
            bar.update(count)
    if starts[-1] == offset:  # nothing follows the last end of line
        del starts[-1], is_record[-1]
    records = np.flatnonzero(np.frombuffer(is_record, dtype=bool)).astype(np.uint64)
    offsets = np.append(np.frombuffer(starts, dtype=np.uint64)[records], np.uint64(offset))
    if len(records) == len(starts):
        return {"offsets": offsets}
    return {"offsets": offsets, "lines": records + np.uint64(1)}


def _mark_length(start: bytes | bytearray) -> int:
    return len(BYTE_ORDER_MARK) if start.startswith(BYTE_ORDER_MARK) else 0


def scan_array(path: Path) -> dict[str, np.ndarray]:
    """Find the elements of a JSON array. Only a part of the file is in memory at a time.

    Returns:
        `spans` uint64 `[records + 1, 2]`: where each record begins and ends, after a first row of zeros (an array
        without elements could not be memory-mapped).

    Raises:
        DataError: If the file is not a JSON array; the message names line and column.
    """
    spans = array("Q", (0, 0))
    with _Window(path) as window, _progress(path, path.stat().st_size) as bar:
        if window.next_sign() != "[":
            raise window.error("the file must contain a JSON array of records")
        window.cursor += 1
        while window.next_sign() != "]":
            spans.extend(window.next_value())
            sign = window.next_sign()
            if sign not in (",", "]"):
                raise window.error("a comma or the end of the array is missing")
            if sign == ",":
                window.cursor += 1
                if window.next_sign() == "]":
                    raise window.error("there is a comma before the end of the array")
            bar.update(window.position - bar.n)
        window.cursor += 1
        if window.next_sign():
            raise window.error("there is more text after the end of the array")
    return {"spans": np.frombuffer(spans, dtype=np.uint64).reshape(-1, 2)}


class _Window:
    """A part of a JSON file that moves forward.

    Bytes are read as Latin-1, so that each character is one byte: the signs that structure JSON are ASCII, and other
    bytes occur only inside strings. Text that is not UTF-8 becomes an error of its record when that is parsed.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("rb")
        self._decoder = json.JSONDecoder(parse_int=str)  # any number of digits: they are parsed with the record
        start = self._file.read(len(BYTE_ORDER_MARK))
        self._start = _mark_length(start)  # offset of the window in the file
        self._text = start[self._start :].decode("latin-1")
        self.cursor = 0  # within the window

    def __enter__(self) -> _Window:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    @property
    def position(self) -> int:
        """Offset of the cursor in the file."""
        return self._start + self.cursor

    def next_sign(self) -> str:
        """Skip white space, and return the next character; empty at the end of the file."""
        while (found := _SIGN.search(self._text, self.cursor)) is None:
            self.cursor = len(self._text)
            if not self._extend():
                return ""
        self.cursor = found.start()
        return found[0]

    def next_value(self) -> tuple[int, int]:
        """Skip a value, and return the offsets of its beginning and end."""
        while True:
            fault = ""
            try:
                _, end = self._decoder.raw_decode(self._text, self.cursor)
            except json.JSONDecodeError as error:
                fault, end = error.msg, error.pos
            except RecursionError:
                raise self.error("the record is nested too deeply") from None
            # A string that is cut off is reported where it begins.
            is_cut = end > len(self._text) - _MARGIN or fault.startswith("Unterminated string")
            size = len(self._text) - self.cursor
            if not is_cut or not self._extend():
                break
            if size >= MAX_RECORD_BYTES + _MARGIN:
                raise self.error(f"a record is longer than {MAX_RECORD_BYTES >> 20} MiB")
        start, self.cursor = self.position, end
        if fault:
            raise self.error(fault)
        return start, self.position

    def _extend(self) -> bool:
        """Drop what has been skipped, and read as much again as is left; False at the end of the file."""
        new = self._file.read(max(CHUNK_BYTES, len(self._text) - self.cursor))
        if new:
            self._start += self.cursor
            self._text, self.cursor = self._text[self.cursor :] + new.decode("latin-1"), 0
        return bool(new)

    def error(self, fault: str) -> DataError:
        """An error that names line and column of the cursor."""
        line, line_start, offset = 1, 0, 0
        with self._path.open("rb") as file:
            while chunk := file.read(min(self.position - offset, CHUNK_BYTES)):
                line += chunk.count(b"\n")
                line_start = offset + chunk.rfind(b"\n") + 1 if b"\n" in chunk else line_start
                offset += len(chunk)
        return DataError(
            f"{self._path}:{line}:{self.position - line_start + 1}: not a valid JSON array ({fault}); correct the "
            "file, or write one record per line (.jsonl)"
        )


def _progress(path: Path, size: int) -> Progress:
    return Progress(desc=f"indexing {path.name}", total=size, unit="B", unit_scale=True, delay=2)
