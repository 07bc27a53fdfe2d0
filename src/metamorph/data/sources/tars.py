"""WebDataset tar archives with random access: members are read from within the tar, and never extracted to disk."""

from __future__ import annotations

import io
import os
import tarfile
from array import array
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from metamorph.data.records import (
    IMAGE_SUFFIXES,
    DataError,
    RawRecord,
    RecordError,
    check_length,
    is_video,
    parse_json,
)
from metamorph.data.sources.index import Index, index_files
from metamorph.runs.progress import Progress


MAX_ATTRIBUTE_BYTES = 2**20
"""Maximum number of bytes before one member that give it a long name or other attributes."""

_BLOCK = tarfile.BLOCKSIZE
_ATTRIBUTE_TYPES = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


class TarSource:
    """Samples of WebDataset tars: consecutive members whose names agree up to the first dot of the file name.

    The `.json` member of a sample is its record. `"image"` (`"video"`) are its image (video) members, unless the JSON
    has such a field; text members become fields: `key.txt` is `"caption"`, `key.edit.txt` is `"edit"`. Without a
    `.json` member, the record consists of the others alone. Its id is the key, unless the JSON has an `"id"`.
    """

    def __init__(self, paths: Sequence[str | os.PathLike[str]]) -> None:
        self.paths = tuple(Path(path) for path in paths)
        self.path = self.paths[0]
        self.index = index_files(self.paths, "tars", lambda: scan_tars(self.paths))

    def __len__(self) -> int:
        return len(self.index["samples"]) - 1

    def __getitem__(self, index: int) -> RawRecord:
        """Read one record; see [`metamorph.data.sources.open.Source`]."""
        sample = self.store(index)
        where = f"{sample.tar}:{sample.key}"
        return RawRecord(where, _read_record(sample, where))

    def store(self, index: int) -> TarSample:
        """The members of one sample, in which the paths of its record are looked up."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path} has no sample {index}: there are {len(self)}")
        return TarSample(self.index, index)


class TarSample:
    """The members of one sample, by name.

    A path means the member of that name; else the one whose name ends like it: `photos/7.jpg` finds `7.jpg`, and
    `source.jpg` finds `000007.source.jpg`.
    """

    def __init__(self, index: Index, number: int) -> None:
        first, last = index["samples"][number : number + 2].tolist()
        name_ends = index["name_ends"][first : last + 1].tolist()
        names = index["names"][name_ends[0] : name_ends[-1]].tobytes()
        texts = [names[start - name_ends[0] : end - name_ends[0]] for start, end in pairwise(name_ends)]
        spans = index["spans"][first:last].tolist()
        self._index = index
        self._file = int(index["files"][first])
        self._spans = {text.decode("utf-8", "surrogateescape"): span for text, span in zip(texts, spans, strict=True)}

    @property
    def tar(self) -> str:
        """Path of the archive."""
        return self._index.stamps[self._file].path

    @property
    def names(self) -> list[str]:
        """Names of the members, in the order of the archive."""
        return list(self._spans)

    @property
    def key(self) -> str:
        """The part that the names of the members share."""
        return split_name(self.names[0])[0]

    def open(self, path: str) -> BinaryIO:
        """A member as an open file in memory; see [`metamorph.data.media.stores.MediaStore`]."""
        return io.BytesIO(self.read(path))

    def exists(self, path: str) -> bool:
        """Whether the sample has such a member."""
        return self._find(path) is not None

    def read(self, path: str) -> bytes:
        """The content of a member.

        Raises:
            FileNotFoundError: If the sample has no such member.
        """
        name = self._find(path)
        if name is None:
            raise FileNotFoundError(
                f"{self.tar} has no member {path!r} in sample {self.key!r}: {', '.join(self.names)}"
            )
        start, end = self._spans[name]
        return self._index.read(start, end, self._file)

    def size(self, name: str) -> int:
        """Size in bytes of the member of exactly that name."""
        start, end = self._spans[name]
        return end - start

    def _find(self, path: str) -> str | None:
        if path in self._spans:
            return path
        base = path.rpartition("/")[2]
        return next((name for name in self._spans if base in (name.rpartition("/")[2], split_name(name)[1])), None)


def scan_tars(paths: Sequence[Path]) -> dict[str, np.ndarray]:
    """Find the members of tars and the samples that they form, reading headers only.

    Returns:
        For all members, tar by tar: `spans` uint64 `[members, 2]`, where the content begins and ends; `files` uint32
        `[members]`, number of the tar; `names` uint8, all names concatenated, and `name_ends` uint64 `[members + 1]`,
        their boundaries. `samples` uint64 `[samples + 1]`: the first member of each sample.

    Raises:
        DataError: If a tar is missing, damaged or compressed, or none holds a file.
    """
    table, samples = MemberTable(), array("Q")
    for number, path in enumerate(Progress(paths, "indexing tars", unit="tar", delay=2)):
        key = None
        for member in read_members(path):
            new_key, _ = split_name(member.name)
            if new_key != key:
                samples.append(len(table))
                key = new_key
            table.add(number, member)
    if not len(table):
        raise DataError(f"--data_path {paths[0]}: the tars contain no files")
    samples.append(len(table))
    return {**table.arrays(), "samples": np.frombuffer(samples, dtype=np.uint64)}


class MemberTable:
    """Places and names of the members of tars, as arrays that an index can save."""

    def __init__(self) -> None:
        self._spans, self._files, self._name_ends, self._names = array("Q"), array("I"), array("Q", [0]), bytearray()

    def __len__(self) -> int:
        return len(self._files)

    def add(self, file: int, member: tarfile.TarInfo) -> None:
        """Append a member of the tar with number `file`."""
        self._spans.extend((member.offset_data, member.offset_data + member.size))
        self._files.append(file)
        self._names += member.name.encode("utf-8", "surrogateescape")
        self._name_ends.append(len(self._names))

    def arrays(self) -> dict[str, np.ndarray]:
        """`spans`, `files`, `names` and `name_ends` as in [`scan_tars`]."""
        return {
            "spans": np.frombuffer(self._spans, dtype=np.uint64).reshape(-1, 2),
            "files": np.array(self._files, dtype=np.uint32),
            "name_ends": np.frombuffer(self._name_ends, dtype=np.uint64),
            "names": np.frombuffer(self._names, dtype=np.uint8),
        }


def split_name(name: str) -> tuple[str, str]:
    """Split the name of a member into the key of its sample and the rest: `a/7.edit.txt` into `a/7` and `edit.txt`."""
    folder, slash, base = name.rpartition("/")
    stem, _, rest = base.partition(".")
    return folder + slash + stem, rest


def read_members(path: Path) -> Iterator[tarfile.TarInfo]:
    """The regular files of a tar; hidden ones, folders, links and devices are skipped.

    Raises:
        DataError: After the members that could be found, if the tar is missing, damaged, truncated or compressed.
    """
    try:
        with path.open("rb", buffering=0) as file:
            for member in _headers(file.fileno()):
                hidden = member.name.rpartition("/")[2].startswith(".")
                if member.isreg() and not member.issparse() and not hidden:
                    yield member
    except FileNotFoundError:
        raise DataError(f"--data_path {path} does not exist; check the names and the numbers in braces") from None
    except (tarfile.TarError, OSError) as error:
        raise DataError(
            f"{path} cannot be read as a tar ({error}); it may be incomplete or compressed: copy it again, or "
            "decompress it (random access needs plain .tar)"
        ) from error


def _headers(file: int) -> Iterator[tarfile.TarInfo]:
    """The headers of all members, after a check that their content lies within the file.

    `tarfile` reads only single headers here, because it trusts sizes when it walks through a file: a negative size
    leads it in circles, and a large size of a name fills the memory.
    """
    file_size = os.fstat(file).st_size
    offset = attributes_start = 0
    attributes: dict[bytes, bytes] = {}
    while (block := os.pread(file, _BLOCK, offset)) != bytes(_BLOCK):
        if not block:
            raise tarfile.ReadError(f"no further member and no end at byte {offset}")
        member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        offset += _BLOCK
        is_attribute = member.type in _ATTRIBUTE_TYPES
        if member.type == tarfile.GNUTYPE_SPARSE:
            offset = _end_of_sparse_map(file, block, offset)
            member.sparse = b""  # what `issparse` looks at
        if not is_attribute:
            _apply(attributes, member)
        member.offset_data = offset
        if is_attribute or member.isreg() or member.type not in tarfile.SUPPORTED_TYPES:
            if not 0 <= member.size <= file_size - offset:
                raise tarfile.ReadError(
                    f"the member {member.name!r:.100} should have {member.size} bytes, but {file_size - offset} "
                    f"follow at byte {offset}"
                )
            offset += -(-member.size // _BLOCK) * _BLOCK
        if is_attribute:
            if offset - attributes_start > MAX_ATTRIBUTE_BYTES:
                raise tarfile.ReadError(f"more than {MAX_ATTRIBUTE_BYTES} bytes of attributes at byte {offset}")
            attributes |= _parse_attributes(member.type, os.pread(file, member.size, member.offset_data))
        else:
            attributes, attributes_start = {}, offset
            yield member


def _end_of_sparse_map(file: int, header: bytes, offset: int) -> int:
    """Where the content of a sparse file of GNU tar begins: after further blocks that list its holes."""
    is_extended = header[482]
    while is_extended:
        block = os.pread(file, _BLOCK, offset)
        if len(block) < _BLOCK:
            raise tarfile.ReadError(f"no further block of a sparse file at byte {offset}")
        offset += _BLOCK
        is_extended = block[504]
    return offset


def _parse_attributes(kind: bytes, content: bytes) -> dict[bytes, bytes]:
    """Attributes that the header of a member has no room for, by their names in the pax format."""
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {b"path": content.partition(b"\0")[0]}
    if kind not in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
        return {}  # targets of links, and attributes of the entire archive
    attributes = {}
    start = 0
    while start < len(content):
        length = content[start : start + 20].partition(b" ")[0]  # of the entire record "LENGTH NAME=VALUE\n"
        end = start + int(length) if length.isdigit() else 0
        name, equals, value = content[start + len(length) + 1 : end].partition(b"=")
        if not equals or not start < end <= len(content):
            raise tarfile.ReadError("the attributes of a member are damaged")
        attributes[name] = value.removesuffix(b"\n")
        start = end
    return attributes


def _apply(attributes: dict[bytes, bytes], member: tarfile.TarInfo) -> None:
    if b"path" in attributes:
        member.name = attributes[b"path"].decode("utf-8", "surrogateescape").rstrip("/")
    if b"size" in attributes:
        digits = attributes[b"size"][:20]  # longer than the size of any file
        if not digits.isdigit():
            raise tarfile.ReadError(f"the member {member.name!r:.100} has the size {digits!r}")
        member.size = int(digits)
    if any(name.startswith(b"GNU.sparse.") for name in attributes):
        member.sparse = b""


def _read_record(sample: TarSample, where: str) -> Any:
    """The record of a sample; fields of its JSON take precedence."""
    jsons = [name for name in sample.names if name.lower().endswith(".json")]
    if len(jsons) > 1:
        raise RecordError.at(where, "bad_field", f"the sample has {len(jsons)} JSON members; keep one", sample.key)
    value = parse_json(_read_text(sample, jsons[0], where), where) if jsons else {}
    if not isinstance(value, dict):
        return value
    value = {field: content for field, content in value.items() if content is not None}
    images = [name for name in sample.names if name.lower().endswith(IMAGE_SUFFIXES)]
    videos = [name for name in sample.names if is_video(name)]
    found: dict[str, Any] = {"id": sample.key}
    if images and "video" not in value:
        found["image"] = images[0] if len(images) == 1 else images
    if videos and "image" not in value:
        found["video"] = videos[0]
    for name in sample.names:
        if name.lower().endswith(".txt"):
            field = split_name(name)[1].rpartition(".")[0] or "caption"
            try:
                found[field] = _read_text(sample, name, where).decode("utf-8-sig").strip()
            except UnicodeDecodeError as error:
                fault = f"the member {name} is not UTF-8 ({error.reason} at byte {error.start})"
                raise RecordError.at(where, "broken_line", fault) from error
    return found | value


def _read_text(sample: TarSample, name: str, where: str) -> bytes:
    check_length(sample.size(name), f"{where} ({name})")
    return sample.read(name)
