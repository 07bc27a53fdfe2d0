"""Images in tar archives, read in place: random access makes order and resume exact to the image."""

import hashlib
import io
import logging
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from metamorph.data.records import DataError
from metamorph.data.sources.index import index_files
from metamorph.data.sources.tars import MemberTable, read_members
from metamorph.models.image_files import load_image
from metamorph.runs.progress import Progress


logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
"""Endings of the names of images, in any case."""

COMPLETE, EMPTY, NO_IMAGE, CUT_OFF, UNREADABLE = range(5)
"""States of an archive."""
_STATES = {
    COMPLETE: "is complete",
    EMPTY: "is empty",
    NO_IMAGE: f"holds files, but none that ends in {', '.join(IMAGE_SUFFIXES)}",
    CUT_OFF: "is cut off or damaged after its last image: copy it again",
    UNREADABLE: "cannot be read as a tar: copy it again, or decompress it (random access needs plain .tar)",
}
_REPORTED = 20
"""Number of damaged or empty archives that the log names."""


@dataclass(frozen=True)
class Archive:
    """Result of scanning a tar."""

    path: Path
    num_images: int
    """Complete images in it."""
    state: int
    """`COMPLETE`, `EMPTY`, `NO_IMAGE`, `CUT_OFF` or `UNREADABLE`."""

    @property
    def is_damaged(self) -> bool:
        """Whether images have been lost."""
        return self.state in (CUT_OFF, UNREADABLE)

    def __str__(self) -> str:
        return f"{self.path} ({self.num_images} images) {_STATES[self.state]}"


class TarImages:
    """All images in uncompressed tars, in the order of the tars and of their members.

    A member is an image if its name ends like one; captions, labels and other members are skipped. The places of the
    images are found once and saved, in the same index as the tars of `metamorph train`. There must be one.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)
        self.index = index_files(self.paths, "pictures", lambda: _scan(self.paths))
        counts, states = self.index["counts"].tolist(), self.index["states"].tolist()
        self.archives = tuple(map(Archive, self.paths, counts, states))

    def __len__(self) -> int:
        return len(self.index["files"])

    def load(self, index: int) -> Image.Image:
        """Image `index` in upright RGB; a MediaError if it cannot be read, a DataError if the archive has changed."""
        start, end = self.index["spans"][index].tolist()
        content = self.index.read(start, end, int(self.index["files"][index]))
        return load_image(io.BytesIO(content), name=self.name(index))

    def name(self, index: int) -> str:
        """`ARCHIVE:MEMBER` of image `index`."""
        start, end = self.index["name_ends"][index : index + 2].tolist()
        member = self.index["names"][start:end].tobytes().decode("utf-8", "surrogateescape")
        return f"{self.paths[int(self.index['files'][index])]}:{member}"

    def digest(self) -> str:
        """Changes with the images and their order, but not when the archives are moved."""
        digest = hashlib.blake2b(digest_size=8)
        for name in ("names", "name_ends", "spans", "files"):
            digest.update(np.ascontiguousarray(self.index[name]).data)
        return digest.hexdigest()

    @property
    def num_lost(self) -> int:
        """Estimate of the images lost to damage: one for an archive that is cut off, the mean number of images of the
        others for one that cannot be read at all.
        """
        read = [archive.num_images for archive in self.archives if archive.num_images]
        states = [archive.state for archive in self.archives]
        return states.count(CUT_OFF) + states.count(UNREADABLE) * max(1, round(sum(read) / len(read)))

    def report(self) -> None:
        """Log the number of archives and images, and every archive with a problem."""
        counts = [archive.num_images for archive in self.archives]
        logger.info("%d archives with %d images, %d to %d each", len(counts), sum(counts), min(counts), max(counts))
        bad = [archive for archive in self.archives if archive.state != COMPLETE]
        for archive in bad[:_REPORTED]:
            logger.warning("%s", archive)
        if len(bad) > _REPORTED:
            logger.warning("and %d more archives with a problem", len(bad) - _REPORTED)


def is_image_name(name: str) -> bool:
    """Whether a file name ends like an image's, in any case."""
    return name.lower().rpartition(".")[2] in IMAGE_SUFFIXES


def _scan(paths: Sequence[Path]) -> dict[str, np.ndarray]:
    """Find the images of tars, reading headers only; damage ends an archive and not the run.

    Returns `spans`, `files`, `names` and `name_ends` of the images, as `metamorph.data.sources.tars.scan_tars` does for
    all members, and `counts` uint32 and `states` uint8 `[archives]`.
    """
    table, counts, states, endings = MemberTable(), array("I"), array("B"), set()
    for number, path in enumerate(Progress(paths, "indexing archives", unit="archive", delay=2)):
        size, before, num_members, is_broken = path.stat().st_size, len(table), 0, False
        try:
            for member in read_members(path):
                num_members += 1
                if is_image_name(member.name):
                    table.add(number, member)
                else:
                    endings.add(member.name.rpartition("/")[2].partition(".")[2])
        except DataError as error:
            is_broken = size > 0
            logger.debug("%s", error)
        if is_broken:
            states.append(CUT_OFF if num_members else UNREADABLE)
        else:
            states.append(COMPLETE if len(table) > before else NO_IMAGE if num_members else EMPTY)
        counts.append(len(table) - before)
    if not len(table):
        found = [f"{path} {_STATES[state]}" for path, state in zip(paths, states, strict=True)]
        others = f"; their members end in {', '.join(sorted(endings)[:8])}" if endings else ""
        raise ValueError(f"none of {len(paths)} archives holds an image: {'; '.join(found[:3])}{others}")
    return {
        **table.arrays(),
        "counts": np.frombuffer(counts, dtype=np.uint32),
        "states": np.frombuffer(states, dtype=np.uint8),
    }
