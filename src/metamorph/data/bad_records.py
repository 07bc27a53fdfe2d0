"""Counts of bad and truncated records: each counts once, however often and in whichever process it is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.utils.data import get_worker_info

from metamorph.data.records import BAD_RECORD_KINDS, ON_BAD_RECORD, DataError


_KINDS = tuple(BAD_RECORD_KINDS)
_SLOTS = 257
"""One counter for the main process, and one for each of 256 workers of a data loader."""


class RecordCounts:
    """Bad and truncated records of one data set, in memory that the workers of a data loader share."""

    def __init__(self, num_records: int) -> None:
        # One or two bytes per record, so that a second epoch counts nothing twice.
        self._kinds = torch.zeros(num_records, dtype=torch.uint8).share_memory_()
        self._dropped = torch.full((num_records,), -1, dtype=torch.int16).share_memory_()  # images; -1: not truncated
        # Totals, cheap enough to read at every bad record. Each process has its own counter, so there are no locks.
        self._num_bad = torch.zeros(_SLOTS, dtype=torch.int64).share_memory_()
        self._num_truncated = torch.zeros(_SLOTS, dtype=torch.int64).share_memory_()

    def note_bad(self, index: int, kind: str) -> bool:
        """Note that record `index` is bad, and return whether that is new.

        A `kind` that is not in `BAD_RECORD_KINDS` counts as `other`.
        """
        is_new = not self._kinds[index]
        if is_new:
            self._num_bad[_slot()] += 1
        self._kinds[index] = _KINDS.index(kind if kind in BAD_RECORD_KINDS else "other") + 1
        return is_new

    def merge(self, reduce_max: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Add the bad records of other ranks, by the element-wise maximum over all ranks of a uint8 `[records]` tensor.

        Every rank must call it.
        """
        everywhere = reduce_max(self._kinds.clone())
        new = (everywhere != 0) & (self._kinds == 0)
        self._kinds[new] = everywhere[new]
        self._num_bad[_slot()] += new.sum()

    def note_truncated(self, index: int, num_dropped_images: int) -> None:
        """Note that record `index` was truncated to `model_max_length`, and lost this number of images."""
        if self._dropped[index] < 0:
            self._num_truncated[_slot()] += 1
        self._dropped[index] = num_dropped_images

    @property
    def num_bad(self) -> int:
        """Number of bad records so far."""
        return int(self._num_bad.sum())

    def bad_by_kind(self) -> dict[str, int]:
        """Number of bad records so far, for each kind that occurred."""
        counts = torch.bincount(self._kinds, minlength=len(_KINDS) + 1).tolist()
        return {kind: count for kind, count in zip(_KINDS, counts[1:], strict=True) if count}

    @property
    def num_truncated(self) -> int:
        """Number of records so far that were truncated."""
        return int(self._num_truncated.sum())

    @property
    def num_dropped_images(self) -> int:
        """Number of images that truncation removed."""
        return int(self._dropped.clamp(min=0).sum())


class TooManyBadRecordsError(DataError):
    """More records are bad than `--max_bad_fraction` allows."""


class BadRecordLimit:
    """Stops a run with too many bad records, counted over all its sources.

    With `on_bad_record="skip"`, their largest share is `max_bad_fraction`.
    """

    unit = "records"

    def __init__(self, on_bad_record: str = "raise", max_bad_fraction: float = 0.01) -> None:
        if on_bad_record not in ON_BAD_RECORD:
            raise ValueError(f"--on_bad_record {on_bad_record!r} is unknown; use one of {', '.join(ON_BAD_RECORD)}")
        if not 0 <= max_bad_fraction <= 1:
            raise ValueError(f"--max_bad_fraction must be between 0 and 1, not {max_bad_fraction}")
        self.on_bad_record = on_bad_record
        self.max_bad_fraction = max_bad_fraction
        self.num_records = 0
        self._all_counts: list[RecordCounts] = []

    def add(self, counts: RecordCounts, num_records: int) -> None:
        """Count also the bad records of `counts`, out of `num_records` that are used."""
        self._all_counts.append(counts)
        self.num_records += num_records

    @property
    def num_bad(self) -> int:
        """Number of bad records so far: of this process and its workers, and of other ranks until the last `merge`."""
        return sum(counts.num_bad for counts in self._all_counts)

    def merge(self, reduce_max: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Add the bad records of other ranks, see [`RecordCounts.merge`]. Every rank must call it."""
        for counts in self._all_counts:
            counts.merge(reduce_max)

    def bad_by_kind(self) -> dict[str, int]:
        """Number of bad records so far, for each kind that occurred."""
        return dict(sum((Counter(counts.bad_by_kind()) for counts in self._all_counts), Counter()))

    def check(self, last: ValueError | None = None) -> None:
        """Raise a [`TooManyBadRecordsError`] if more than `max_bad_fraction` of all records are bad.

        The message ends with the error of the `last` one.
        """
        num_bad = self.num_bad
        if num_bad > self.max_bad_fraction * self.num_records:
            example = "" if last is None else f". The last one: {last}"
            raise TooManyBadRecordsError(
                f"{num_bad} of {self.num_records} {self.unit} are bad, more than --max_bad_fraction "
                f"{self.max_bad_fraction} allows: {self.bad_by_kind()}{example}"
            ) from last


def merge_ranks(counted: BadRecordLimit, merged: int, device: torch.device) -> int:
    """Merge the counts of all ranks if any of them is new, and return the number of bad records of all ranks.

    All ranks must call it at the same point. `merged` is the result of the last call, which is returned if nothing is
    new; at first 0, or a number that `num_bad` cannot be.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return merged

    def reduce_max(values: torch.Tensor) -> torch.Tensor:
        values = values.to(device)
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values.cpu()

    is_new = torch.tensor([counted.num_bad != merged], dtype=torch.uint8)
    if not reduce_max(is_new).item():
        return merged
    counted.merge(reduce_max)
    return counted.num_bad


def _slot() -> int:
    worker = get_worker_info()
    return 0 if worker is None else 1 + worker.id % (_SLOTS - 1)
