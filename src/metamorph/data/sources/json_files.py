"""JSON Lines and JSON arrays with random access: offsets are kept, and a record is read when it is asked for."""

from __future__ import annotations

import json
import os
import re
from array import array
from collections.abc import Iterator
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
_NO_SPACE = re.compile(r"[^ \t\r\n]")


class JsonlSource:
    """JSON Lines: one record on each line, blank lines ignored.

    Args:
        path: The file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.index = index_files([self.path], "lines", lambda: scan_lines(self.path))

    def fingerprint(self) -> str:
        """Changes when the file does."""
        return self.index.fingerprint()

    def __len__(self) -> int:
        return len(self.index["offsets"]) - 1

    def __getitem__(self, index: int) -> RawRecord:
        """Read one record; see [`metamorph.data.sources.open.Source`]."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path} has no record {index}: it holds {len(self)}")
        start, end = self.index["offsets"][index : index + 2].tolist()
        number = int(self.index["lines"][index]) if "lines" in self.index else index + 1
        where = f"{self.path}:{number}"
        check_length(end - start, where)
        return RawRecord(where, parse_json(self.index.read(start, end).rstrip(_SPACE), where))


class JsonArraySource:
    """A JSON array of records.

    Args:
        path: The file.

    Raises:
        DataError: If the file is not a JSON array.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.index = index_files([self.path], "array", lambda: scan_array(self.path))

    def fingerprint(self) -> str:
        """Changes when the file does."""
        return self.index.fingerprint()

    def __len__(self) -> int:
        return len(self.index["spans"]) - 1

    def __getitem__(self, index: int) -> RawRecord:
        """Read one record; see [`metamorph.data.sources.open.Source`]."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path} has no record {index}: it holds {len(self)}")
        start, end = self.index["spans"][index + 1].tolist()
        where = f"{self.path}[{index}]"
        check_length(end - start, where)
        return RawRecord(where, parse_json(self.index.read(start, end), where))


def scan_lines(path: Path) -> dict[str, np.ndarray]:
    """Find the lines of a file that are not blank.

    Args:
        path: The file.

    Returns:
        `offsets` uint64 `[records + 1]`: where each record begins, and the size of the file. Blank lines between two
        records count as the end of the first. Only if there are such lines, `lines` uint64 `[records]`: the numbers
        of the records' lines, from 1.
    """
    starts, suspects = [], []
    size = path.stat().st_size
    offset, at_start = 0, True
    buffer = bytearray(CHUNK_BYTES)
    with path.open("rb", buffering=0) as file, _progress(path, size) as bar:
        while count := file.readinto(buffer):
            chunk = np.frombuffer(buffer, dtype=np.uint8, count=count)
            begins = np.flatnonzero(chunk == ord("\n")) + 1
            if at_start:
                begins = np.concatenate([[_mark_length(buffer) if offset == 0 else 0], begins])
            at_start = begins[-1:].tolist() == [count]  # the next line begins with the next chunk
            if at_start:
                begins = begins[:-1]
            starts.append((begins + offset).astype(np.uint64))
            # What begins with a letter is not blank; the few other lines are looked at afterwards.
            suspects.append(starts[-1][np.isin(chunk[begins], list(_SPACE))])
            offset += count
            bar.update(count)
    offsets = np.concatenate([*starts, [np.uint64(offset)]]).astype(np.uint64)
    blank = _blank_lines(path, offsets, np.concatenate(suspects) if suspects else offsets[:0])
    if not len(blank):
        return {"offsets": offsets}
    kept = np.delete(np.arange(len(offsets) - 1, dtype=np.uint64), blank)
    return {"offsets": np.append(offsets[kept], offsets[-1]), "lines": kept + np.uint64(1)}


def _mark_length(start: bytearray) -> int:
    return len(BYTE_ORDER_MARK) if start.startswith(BYTE_ORDER_MARK) else 0


def _blank_lines(path: Path, offsets: np.ndarray, suspects: np.ndarray) -> np.ndarray:
    """Which lines hold white space only.

    Args:
        path: The file.
        offsets: uint64 `[lines + 1]` where the lines begin, and the file's size.
        suspects: Those offsets whose line begins with white space.
    """
    numbers = np.searchsorted(offsets, suspects)
    blank = []
    with path.open("rb") as file:
        for number in numbers.tolist():
            start, end = offsets[number : number + 2].tolist()
            file.seek(start)
            while start < end and not file.read(min(end - start, CHUNK_BYTES)).strip(_SPACE):
                start += CHUNK_BYTES
            if start >= end:
                blank.append(number)
    return np.array(blank, dtype=np.int64)


def scan_array(path: Path) -> dict[str, np.ndarray]:
    """Find the elements of a JSON array, of which only some are in memory at a time.

    Args:
        path: The file.

    Returns:
        `spans` uint64 `[records + 1, 2]`: where each record begins and ends, behind a first row of zeros (an array
        without elements could not be memory-mapped).

    Raises:
        DataError: If the file is not a JSON array; the message names line and column.
    """
    spans = array("Q", (0, 0))
    with _progress(path, path.stat().st_size) as bar:
        for start, end in _elements(path):
            spans.extend((start, end))
            bar.update(end - bar.n)
    return {"spans": np.frombuffer(spans, dtype=np.uint64).reshape(-1, 2)}


def _elements(path: Path) -> Iterator[tuple[int, int]]:
    """Byte offsets of the elements of a JSON array."""
    with path.open("rb") as file:
        text = _Window(path, file.fileno())
        position = text.skip_space(_mark_length(bytearray(file.read(len(BYTE_ORDER_MARK)))))
        if text.at(position) != "[":
            raise text.error("the file must hold a JSON array of records", position)
        position = text.skip_space(position + 1)
        while text.at(position) != "]":
            end = text.end_of_value(position)
            yield position, end
            position = text.skip_space(end)
            if text.at(position) == ",":
                position = text.skip_space(position + 1)
                if text.at(position) == "]":
                    raise text.error("a comma stands before the end of the array", position)
            elif text.at(position) != "]":
                raise text.error("a comma or the end of the array is missing", position)
        position = text.skip_space(position + 1)
        if text.at(position):
            raise text.error("something stands behind the end of the array", position)


class _Window:
    """A part of a file that moves forward, as text in which each character is one byte.

    The signs that structure JSON are ASCII, and bytes of other characters only occur inside strings; so Latin-1 serves
    for finding where a value ends, and positions are byte offsets.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path = path
        self._file = descriptor
        self._decoder = json.JSONDecoder(parse_int=str)  # any number of digits: they are parsed with the record
        self._start = 0
        self._text = ""

    def at(self, position: int) -> str:
        """The character at a position, empty at the end of the file. Positions before it may be forgotten."""
        if position - self._start >= len(self._text):
            self._move(position, CHUNK_BYTES)
        return self._text[position - self._start : position - self._start + 1]

    def skip_space(self, position: int) -> int:
        """The next position that is not white space."""
        while (character := self.at(position)) and character in " \t\r\n":
            found = _NO_SPACE.search(self._text, position - self._start)
            if found:
                return self._start + found.start()
            position = self._start + len(self._text)
        return position

    def end_of_value(self, position: int) -> int:
        """The position behind the value that begins at `position`."""
        size = CHUNK_BYTES
        while True:
            try:
                _, end = self._decoder.raw_decode(self._text, position - self._start)
            except json.JSONDecodeError as error:
                # Was the value cut off by the end of the window? Strings may have begun far before it.
                is_cut = error.pos > len(self._text) - 16 or error.msg.startswith("Unterminated string")
                fault, where = error.msg, self._start + error.pos
            except RecursionError:
                raise self.error("the record is nested too deeply", position) from None
            else:
                is_cut = end == len(self._text)  # of a number, say, more digits may follow
                fault, where = "", self._start + end
            if not is_cut or self._is_at_end:
                if fault:
                    raise self.error(fault, where)
                return where
            if len(self._text) - (position - self._start) >= MAX_RECORD_BYTES:
                raise self.error(f"a record is longer than {MAX_RECORD_BYTES >> 20} MiB", position)
            self._move(position, size)
            size *= 2

    @property
    def _is_at_end(self) -> bool:
        return not os.pread(self._file, 1, self._start + len(self._text))

    def _move(self, position: int, size: int) -> None:
        """Begin at `position`, and read `size` bytes more than are there."""
        self._text = self._text[position - self._start :]
        self._start = position
        self._text += os.pread(self._file, size, position + len(self._text)).decode("latin-1")

    def error(self, fault: str, position: int) -> DataError:
        """An error that names line and column of a position."""
        with self._path.open("rb") as file:
            line, rest = 1, position
            last = b""
            while chunk := file.read(min(rest, CHUNK_BYTES)):
                rest -= len(chunk)
                line += chunk.count(b"\n")
                last = (last + chunk).rpartition(b"\n")[2]
        return DataError(
            f"{self._path}:{line}:{len(last) + 1}: not a valid JSON array ({fault}); correct the file, or keep one "
            "record on each line (.jsonl)"
        )


def _progress(path: Path, size: int) -> Progress:
    return Progress(desc=f"indexing {path.name}", total=size, unit="B", unit_scale=True, delay=2)
