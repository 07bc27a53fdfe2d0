"""Pictures in tar shards, read where they lie: random access, so that order and resume are exact to the picture."""

from __future__ import annotations

import hashlib
import io
import logging
import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from metamorph.data.records import DataError
from metamorph.data.sources.index import Index, index_files
from metamorph.data.sources.tars import MemberTable, read_members
from metamorph.models.image_files import load_image
from metamorph.runs.progress import Progress


logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
"""How the names of pictures end, in capitals or not."""
TAR_SUFFIX = ".tar"

WHOLE, EMPTY, NO_PICTURE, CUT_OFF, UNREADABLE = range(5)
"""States of a shard."""
_STATES = {
    EMPTY: "is empty",
    NO_PICTURE: f"holds files, but none that ends in {', '.join(IMAGE_SUFFIXES)}",
    CUT_OFF: "is cut off or damaged behind its last picture: copy it anew",
    UNREADABLE: "cannot be read as a tar: copy it anew, or decompress it (random access needs plain .tar)",
}
_REPORTED = 20
"""Shards with something wrong that the log names one by one."""


@dataclass(frozen=True)
class Shard:
    """What was found in one tar."""

    path: Path
    """The tar."""
    num_images: int
    """Whole pictures in it."""
    state: int
    """`WHOLE`, `EMPTY`, `NO_PICTURE`, `CUT_OFF` or `UNREADABLE`."""

    @property
    def is_damaged(self) -> bool:
        """Whether pictures have been lost."""
        return self.state in (CUT_OFF, UNREADABLE)

    def __str__(self) -> str:
        problem = _STATES.get(self.state, "is whole")
        return f"{self.path} ({self.num_images} pictures) {problem}"


class ShardedImages:
    """Every picture in tars, in the order of the tars and of their members.

    A member is a picture if its name ends like one; captions, labels and other members are passed over. Where each
    picture lies is found once and saved as the index of `metamorph train`'s tars is.

    Args:
        paths: The tars, not compressed.

    Raises:
        FileNotFoundError: If one does not exist.
        ValueError: If none holds a picture.
    """

    def __init__(self, paths: Sequence[str | os.PathLike[str]]) -> None:
        self.paths = tuple(Path(path) for path in paths)
        for path in self.paths:
            if not path.is_file():
                raise FileNotFoundError(f"the shard {path} does not exist or is not a file")
        self.index: Index = index_files(self.paths, "pictures", lambda: scan_shards(self.paths))
        counts, states = self.index["counts"].tolist(), self.index["states"].tolist()
        self.shards = tuple(Shard(*values) for values in zip(self.paths, counts, states, strict=True))

    def __len__(self) -> int:
        return len(self.index["files"])

    def load(self, index: int) -> Image.Image:
        """Picture `index` in upright RGB.

        Raises:
            MediaError: Naming shard and member, if it cannot be read as a picture.
            DataError: If the shard has changed since the start.
        """
        start, end = self.index["spans"][index].tolist()
        content = self.index.read(start, end, int(self.index["files"][index]))
        return load_image(io.BytesIO(content), name=self.name(index))

    def name(self, index: int) -> str:
        """`SHARD:MEMBER` of picture `index`."""
        start, end = self.index["name_ends"][index : index + 2].tolist()
        member = self.index["names"][start:end].tobytes().decode("utf-8", "surrogateescape")
        return f"{self.paths[int(self.index['files'][index])]}:{member}"

    def digest(self) -> str:
        """Changes when other pictures are found, or in another order; not when the shards are moved."""
        digest = hashlib.blake2b(digest_size=8)
        for name in ("names", "name_ends", "spans", "files"):
            digest.update(np.ascontiguousarray(self.index[name]).data)
        return digest.hexdigest()

    @property
    def num_lost(self) -> int:
        """About how many pictures damage has cost: one for a shard that is cut off, as many as the others have on the
        average for one that cannot be read at all.
        """
        read = [shard.num_images for shard in self.shards if shard.num_images]
        states = [shard.state for shard in self.shards]
        return states.count(CUT_OFF) + states.count(UNREADABLE) * max(1, round(sum(read) / len(read)))


def scan_shards(paths: Sequence[Path]) -> dict[str, np.ndarray]:
    """Find the pictures of shards, reading headers only; damage ends a shard and not the run.

    Args:
        paths: The tars.

    Returns:
        `spans`, `files`, `names` and `name_ends` of the pictures, as `metamorph.data.sources.tars.scan_tars` has
        them of all members; `counts` uint32 and `states` uint8 `[shards]`, what was found in each.

    Raises:
        ValueError: If there is no picture in any of them.
    """
    table, counts, states, endings = MemberTable(), array("I"), array("B"), set()
    for number, path in enumerate(Progress(paths, "indexing shards", unit="shard", delay=2)):
        size, before, num_members, is_broken = path.stat().st_size, len(table), 0, False
        try:
            for member in read_members(path):
                num_members += 1
                if not is_image_name(member.name):
                    endings.add(member.name.rpartition("/")[2].partition(".")[2])
                else:
                    table.add(number, member)
        except DataError as error:
            is_broken = size > 0
            logger.debug("%s", error)
        counts.append(len(table) - before)
        states.append(_state(is_broken, num_members, len(table) - before))
    if not len(table):
        found = [f"{path} {_STATES[state]}" for path, state in zip(paths, states, strict=True)]
        others = f"; their members end in {', '.join(sorted(endings)[:8])}" if endings else ""
        raise ValueError(f"none of {len(paths)} shards holds a picture: {'; '.join(found[:3])}{others}")
    return {
        **table.arrays(),
        "counts": np.frombuffer(counts, dtype=np.uint32),
        "states": np.frombuffer(states, dtype=np.uint8),
    }


def report_shards(shards: Sequence[Shard]) -> None:
    """Log how many shards and pictures there are, and every shard with which something is wrong."""
    counts = [shard.num_images for shard in shards]
    logger.info("%d shards with %d pictures, %d to %d each", len(counts), sum(counts), min(counts), max(counts))
    wrong = [shard for shard in shards if shard.state != WHOLE]
    for shard in wrong[:_REPORTED]:
        logger.warning("%s", shard)
    if len(wrong) > _REPORTED:
        logger.warning("and %d more shards with something wrong", len(wrong) - _REPORTED)


def is_image_name(name: str) -> bool:
    """Whether a file name ends like a picture's, in capitals or not."""
    return name.lower().rpartition(".")[2] in IMAGE_SUFFIXES


def is_tar_name(name: str) -> bool:
    """Whether a file name ends like a tar's, in capitals or not."""
    return name.lower().endswith(TAR_SUFFIX)


def _state(is_broken: bool, num_members: int, num_images: int) -> int:
    if is_broken:
        return CUT_OFF if num_members else UNREADABLE
    if num_images:
        return WHOLE
    return NO_PICTURE if num_members else EMPTY
