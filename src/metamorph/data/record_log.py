"""What happened to each record, counted once however often it is read and in whichever process."""

from __future__ import annotations

import torch
from torch.utils.data import get_worker_info

from metamorph.data.records import BAD_RECORD_KINDS


_KINDS = tuple(BAD_RECORD_KINDS)
_SLOTS = 257
"""One counter for the main process and one for each of 256 workers of a data loader."""


class RecordLog:
    """Notes on the records of one data set, in memory that the workers of a data loader share.

    Args:
        num_records: Number of records.
    """

    def __init__(self, num_records: int) -> None:
        # One byte (or two) a record, so that a second epoch counts nothing twice.
        self._kinds = torch.zeros(num_records, dtype=torch.uint8).share_memory_()
        self._truncated = torch.zeros(num_records, dtype=torch.bool).share_memory_()
        self._dropped = torch.zeros(num_records, dtype=torch.int16).share_memory_()
        # Totals that can be read at every bad record. Each process adds to a counter of its own: no locks.
        self._num_bad = torch.zeros(_SLOTS, dtype=torch.int64).share_memory_()
        self._num_truncated = torch.zeros(_SLOTS, dtype=torch.int64).share_memory_()

    def note_bad(self, index: int, kind: str) -> None:
        """Record `index` is bad; `kind` is one of `BAD_RECORD_KINDS`, any other counts as `other`."""
        if not self._kinds[index]:
            self._num_bad[_slot()] += 1
        self._kinds[index] = _KINDS.index(kind if kind in BAD_RECORD_KINDS else "other") + 1

    def note_truncated(self, index: int, num_dropped_images: int) -> None:
        """Record `index` was cut to `model_max_length` and lost this many images."""
        if not self._truncated[index]:
            self._num_truncated[_slot()] += 1
        self._truncated[index] = True
        self._dropped[index] = num_dropped_images

    @property
    def num_bad(self) -> int:
        """Number of bad records met so far."""
        return int(self._num_bad.sum())

    def bad_by_kind(self) -> dict[str, int]:
        """Number of bad records met so far, for each kind that occurred."""
        counts = torch.bincount(self._kinds, minlength=len(_KINDS) + 1).tolist()
        return {kind: count for kind, count in zip(_KINDS, counts[1:], strict=True) if count}

    @property
    def num_truncated(self) -> int:
        """Number of records met so far that were cut."""
        return int(self._num_truncated.sum())

    @property
    def num_dropped_images(self) -> int:
        """Number of images that were cut off with their placeholders."""
        return int(self._dropped.sum())


def _slot() -> int:
    """The counter of this process."""
    worker = get_worker_info()
    return 0 if worker is None else 1 + worker.id % (_SLOTS - 1)
