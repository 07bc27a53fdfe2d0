"""Pictures that cannot be read: each is counted once, named in the log, and too many of them stop the run."""

from __future__ import annotations

import logging

from metamorph.data.bad_records import BadRecordLimit, RecordLog
from metamorph.models.image_files import MediaError
from metamorph.visualizer_training.pictures.shards import ShardedImages


logger = logging.getLogger(__name__)


class BadPictures(BadRecordLimit):
    """Counts bad pictures over all workers, processes and epochs.

    Args:
        num_pictures: Pictures that can be met.
        on_bad_image: `raise`, or `skip` to leave bad pictures out.
        max_bad_fraction: Largest share of bad pictures with `skip`.
    """

    unit = "pictures"

    def __init__(self, num_pictures: int, on_bad_image: str = "raise", max_bad_fraction: float = 0.01) -> None:
        super().__init__(on_bad_image, max_bad_fraction)
        self.num_lost = 0
        """Pictures that damaged shards have cost."""
        self._log = RecordLog(num_pictures)
        self.add(self._log, num_pictures)

    @property
    def num_bad(self) -> int:
        """Bad pictures met so far, by other processes until they are merged, and those lost with damaged shards."""
        return self.num_lost + super().num_bad

    def bad_by_kind(self) -> dict[str, int]:
        """See [`BadRecordLimit`]; with those lost."""
        return super().bad_by_kind() | ({"lost with damaged shards": self.num_lost} if self.num_lost else {})

    def add_lost(self, shards: ShardedImages) -> None:
        """Count what damaged shards have cost.

        Raises:
            ValueError: If there is a damaged shard and bad pictures are not to be skipped.
            TooManyBadRecordsError: If it is too much.
        """
        damaged = [shard for shard in shards.shards if shard.is_damaged]
        if damaged and self.on_bad_record == "raise":
            raise ValueError(
                f"{len(damaged)} of {len(shards.shards)} shards are damaged: {'; '.join(map(str, damaged[:3]))}. Or go "
                "on with the pictures that can be read: --on_bad_image skip"
            )
        self.num_lost += shards.num_lost
        self.num_records += shards.num_lost
        self.check()

    def note(self, index: int, error: MediaError) -> None:
        """Picture `index` cannot be read.

        Raises:
            ValueError: If bad pictures are not to be skipped.
            TooManyBadRecordsError: If this is one too many.
        """
        if self.on_bad_record == "raise":
            raise ValueError(f"{error}. Or leave such pictures out: --on_bad_image skip") from error
        if self._log.note_bad(index, error.kind):
            logger.warning("left out: %s", error)
            self.check(error)
