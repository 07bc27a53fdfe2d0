"""Open the files that `--data_path` names: JSON Lines, a JSON array, or WebDataset tars."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

from metamorph.data.records import BYTE_ORDER_MARK, DataError
from metamorph.data.sources.json_files import JsonArraySource, JsonlSource
from metamorph.data.sources.tars import TarSource


ALLOWED = "a .json or .jsonl file of records, tar files (shard-{000..099}.tar), or a mixture (.yaml)"
"""What `--data_path` accepts, for error messages."""
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(-?\d{1,18})\.\.(-?\d{1,18})")
MAX_FILES = 1_000_000
"""Maximum number of files that the braces of a pattern may name."""
MAX_PATTERN = 4096
"""Maximum number of characters of a pattern: that of a path."""


Source = JsonlSource | TarSource
"""A sequence of raw records with random access. `source[index]` raises a `RecordError` if the record is not JSON, and a
`DataError` if its file has changed since it was indexed."""


def open_source(path: str | os.PathLike[str], flag: str = "--data_path") -> Source:
    """Open files of records: tars (one, or a pattern for [`expand_pattern`]), or a file.

    A file that begins with `[` is a JSON array, any other JSON Lines.

    Raises:
        DataError: If there is no such file, it has no records, or an array or a tar cannot be read; it names `flag`.
    """
    if is_tar_pattern(path):
        return TarSource(expand_pattern(path))
    path = Path(path)
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "is not a regular file" if path.exists() else "does not exist"
        raise DataError(f"{flag} {path} {found}; give {ALLOWED}")
    with path.open("rb") as file:
        start = file.read(4096)
    if b"\0" in start:
        raise DataError(f"{flag} {path} is not UTF-8 text (compressed, perhaps?); give {ALLOWED}")
    is_array = start.removeprefix(BYTE_ORDER_MARK).lstrip().startswith(b"[")
    source: Source = JsonArraySource(path) if is_array else JsonlSource(path)
    if len(source) == 0:
        raise DataError(f"{flag} {path} has no records")
    return source


def is_tar_pattern(path: str | os.PathLike[str]) -> bool:
    """Whether a path names tar files. Compressed ones count, so that the error says why they are refused."""
    return str(path).lower().endswith((".tar", ".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2"))


def expand_pattern(pattern: str | os.PathLike[str]) -> list[Path]:
    """The files that a pattern names, in order.

    It may contain `{000..099}` (leading zeros are kept), `{a,b}`, `*`, `?` and `[...]`. A file whose name is the
    pattern itself takes precedence.

    Raises:
        DataError: If a file that the braces name is missing, nothing matches, a file is named twice, or the pattern is
            longer than `MAX_PATTERN` or names more than `MAX_FILES`.
    """
    pattern = os.path.expanduser(pattern)
    if len(pattern) > MAX_PATTERN:
        raise DataError(
            f"--data_path {pattern[:80]}…: it has {len(pattern)} characters, more than {MAX_PATTERN}; split it into "
            "several sources of a mixture"
        )
    if os.path.exists(pattern):
        return [Path(pattern)]
    paths: dict[Path, None] = {}
    missing = []
    for name in _expand_braces(pattern):
        found = sorted(glob.glob(name)) if glob.has_magic(name) else [name] * os.path.exists(name)
        for path in map(Path, found):
            if path in paths:
                raise DataError(f"--data_path {pattern}: it names {path} twice; correct its braces")
            paths[path] = None
        if not found:
            missing.append(name)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise DataError(f"--data_path {pattern}: {missing[0]}{more} does not exist; check the pattern and its numbers")
    return list(paths)


def _expand_braces(pattern: str) -> Iterator[str]:
    """All names of a pattern whose braces are not nested; the leftmost braces change slowest."""
    pieces = _BRACES.split(pattern)  # texts and, between them, insides of braces
    choices: list[Sequence[str]] = []
    num_files = 1
    for number, piece in enumerate(pieces):
        choices.append(_choices(piece) if number % 2 else [piece])
        num_files *= len(choices[-1])
        if num_files > MAX_FILES:
            raise DataError(
                f"--data_path {pattern}: the braces name more than {MAX_FILES} files; check their numbers, or split "
                "the pattern into several sources of a mixture"
            )
    return map("".join, product(*choices))


def _choices(inside: str) -> Sequence[str]:
    bounds = _RANGE.fullmatch(inside)
    if bounds is None:
        return inside.split(",")
    first, last = bounds[1], bounds[2]
    is_padded = any(text.lstrip("-").startswith("0") and len(text.lstrip("-")) > 1 for text in (first, last))
    width = max(len(first), len(last)) if is_padded else 0
    step = 1 if int(last) >= int(first) else -1
    return [f"{number:0{width}d}" for number in range(int(first), int(last) + step, step)[: MAX_FILES + 1]]
