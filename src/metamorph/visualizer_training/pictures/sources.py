"""Where the pictures of the visualizer are: in files, in tar shards, or in memory; read by their number."""

from __future__ import annotations

import hashlib
import logging
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from metamorph.data.media.images import resolve_image_path
from metamorph.data.records import RawRecord
from metamorph.data.sources.open import Source, open_source
from metamorph.models.image_files import MediaError, load_image
from metamorph.models.image_processing import to_rgb
from metamorph.visualizer_training.pictures.shards import (
    IMAGE_SUFFIXES,
    TAR_SUFFIX,
    ShardedImages,
    is_image_name,
    is_tar_name,
)


logger = logging.getLogger(__name__)

RECORD_KEYS = ("image", *IMAGE_SUFFIXES)


class ImageSource(Protocol):
    """Random access to pictures: what a source of another storage format has to offer."""

    def __len__(self) -> int:
        """Number of pictures."""

    def load(self, index: int) -> Image.Image:
        """Picture `index` in upright RGB.

        Raises:
            MediaError: If it cannot be read as a picture.
        """

    def name(self, index: int) -> str:
        """What messages call picture `index`."""

    def digest(self) -> str:
        """Changes when there are other pictures, or in another order."""


@dataclass(frozen=True)
class ImageFiles:
    """Pictures in files."""

    paths: tuple[Path, ...]
    """One file per picture."""

    def __len__(self) -> int:
        return len(self.paths)

    def load(self, index: int) -> Image.Image:
        """Picture `index` in upright RGB.

        Raises:
            MediaError: Naming the file, if it cannot be read as a picture.
        """
        return load_image(self.paths[index])

    def name(self, index: int) -> str:
        """Path of the file."""
        return str(self.paths[index])

    def digest(self) -> str:
        """Of the names of the files, without their folders: data may be moved between two runs."""
        return _digest(path.name for path in self.paths)

    @classmethod
    def from_folder(cls, folder: str | Path) -> ImageFiles:
        """All pictures of a folder and its subfolders, in the order of their names.

        Raises:
            ValueError: If there is none.
        """
        paths = [path for path in _files_of(folder) if is_image_name(path.name)]
        if not paths:
            raise ValueError(f"--image_folder {folder} holds no picture ending in {', '.join(IMAGE_SUFFIXES)}")
        return cls(tuple(paths))


@dataclass(frozen=True)
class ImageList:
    """Pictures in memory."""

    images: Sequence[Image.Image]
    """The pictures."""

    def __len__(self) -> int:
        return len(self.images)

    def load(self, index: int) -> Image.Image:
        """Picture `index` in RGB."""
        return to_rgb(self.images[index])

    def name(self, index: int) -> str:
        """Number of the picture."""
        return f"images[{index}]"

    def digest(self) -> str:
        """Of the sizes of the pictures."""
        return _digest(str(image.size) for image in self.images)


class JoinedImages:
    """Several sources, one behind the other.

    Args:
        parts: The sources.
    """

    def __init__(self, parts: Sequence[ImageSource]) -> None:
        self.parts = tuple(parts)
        self._ends = list(accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def load(self, index: int) -> Image.Image:
        """Picture `index` in upright RGB.

        Raises:
            MediaError: If it cannot be read as a picture.
        """
        part, inner = self._find(index)
        return part.load(inner)

    def name(self, index: int) -> str:
        """What its source calls picture `index`."""
        part, inner = self._find(index)
        return part.name(inner)

    def digest(self) -> str:
        """Of the digests of the sources."""
        return _digest(part.digest() for part in self.parts)

    def _find(self, index: int) -> tuple[ImageSource, int]:
        number = bisect_right(self._ends, index)
        return self.parts[number], index - (self._ends[number - 1] if number else 0)


def open_pictures(image_jsons: Sequence[str | Path] = (), image_folder: str | Path | None = None) -> ImageSource:
    """The pictures that the flags name: those in files first, then those in tar shards.

    Args:
        image_jsons: JSON arrays or JSONL files of paths, or of records with one of `RECORD_KEYS` whose value is a path
            or a list of paths (so LLaVA data serves as it is; its text-only records are passed over). A path that ends
            in `.tar` is a shard. Relative paths may not leave the folder that they start from.
        image_folder: What relative paths start from, by default the folder of the JSON file. Without `image_jsons`,
            the folder whose pictures and shards are taken, with its subfolders.

    Raises:
        ValueError: If there are none, or, naming file and record, a list is not of that form.
        FileNotFoundError: If a listed file does not exist.
    """
    if image_jsons:
        paths, flag = list(_listed(image_jsons, image_folder)), f"--image_jsons {' '.join(map(str, image_jsons))} lists"
    elif image_folder:
        paths, flag = _files_of(image_folder), f"--image_folder {image_folder} holds"
    else:
        raise ValueError("no pictures to train on; set --image_folder or --image_jsons")
    tars = [path for path in paths if is_tar_name(path.name)]
    # A list says itself what is a picture; in a folder the names do.
    files = [path for path in paths if (not is_tar_name(path.name) if image_jsons else is_image_name(path.name))]
    if not files and not tars:
        raise ValueError(f"{flag} no picture ending in {', '.join(IMAGE_SUFFIXES)}, and no {TAR_SUFFIX} shard")
    once = list(dict.fromkeys(tars))
    if len(once) < len(tars):
        logger.warning("%d shards are listed more than once; each is read once", len(tars) - len(once))
    parts: list[ImageSource] = [ImageFiles(tuple(files))] if files else []
    if once:
        parts.append(ShardedImages(once))
    return parts[0] if len(parts) == 1 else JoinedImages(parts)


def shards_of(source: ImageSource) -> ShardedImages | None:
    """The part of a source that lies in shards, if there is one."""
    parts = source.parts if isinstance(source, JoinedImages) else (source,)
    return next((part for part in parts if isinstance(part, ShardedImages)), None)


def _files_of(folder: str | Path) -> list[Path]:
    """All files of a folder and its subfolders, in the order of their names."""
    return sorted(path for path in Path(folder).expanduser().rglob("*") if path.is_file())


def _listed(files: Sequence[str | Path], image_folder: str | Path | None) -> Iterator[Path]:
    """The paths that lists name."""
    for file in files:
        root = Path(image_folder).expanduser() if image_folder else Path(file).expanduser().parent
        for number, raw in enumerate(_records(open_source(Path(file).expanduser(), "--image_jsons")), start=1):
            for name in _image_names(raw.value, where=f"{file}, record {number}"):
                try:
                    path = resolve_image_path(name, root)
                except MediaError as error:
                    raise ValueError(f"{file}, record {number}: {error}") from None
                if not os.path.isfile(path):
                    kind = "shard" if is_tar_name(name) else "picture"
                    raise FileNotFoundError(
                        f"{file}, record {number}: {kind} {path} does not exist; check --image_folder"
                    )
                yield path


def _records(source: Source) -> Iterator[RawRecord]:
    return (source[index] for index in range(len(source)))


def _image_names(record: Any, where: str) -> list[str]:
    """File names of the pictures of a record; none for a text-only one."""
    value = record
    if isinstance(record, dict):
        value = next((record[key] for key in RECORD_KEYS if record.get(key)), [])
    names = value if isinstance(value, list) else [value]
    for name in names:
        if not isinstance(name, str):
            raise ValueError(f"{where}: {name!r} is not the path of a picture")
    return names


def _digest(names: Iterator[str]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for name in names:
        digest.update(name.encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()
