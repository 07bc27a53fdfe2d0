"""Count images that cannot be read. Each is logged once; too many of them stop the run."""

import logging

from metamorph.data.bad_records import BadRecordLimit, RecordCounts
from metamorph.models.image_files import MediaError
from metamorph.visualizer_training.images.archives import TarImages


logger = logging.getLogger(__name__)


class BadImages(BadRecordLimit):
    """Bad images over all workers, processes and epochs, and those lost with damaged archives.

    `on_bad_image` is `raise`, or `skip` to leave out a share of up to `max_bad_fraction`.
    """

    unit = "images"

    def __init__(self, num_images: int, on_bad_image: str = "raise", max_bad_fraction: float = 0.01) -> None:
        super().__init__(on_bad_image, max_bad_fraction)
        self.num_lost = 0
        """Images lost with damaged archives."""
        self._image_counts = RecordCounts(num_images)
        self.add(self._image_counts, num_images)

    @property
    def num_bad(self) -> int:
        """Bad images met so far, those of other processes since the last `merge`, and lost ones."""
        return self.num_lost + super().num_bad

    def bad_by_kind(self) -> dict[str, int]:
        """See [`BadRecordLimit`]; lost images are a kind, too."""
        return super().bad_by_kind() | ({"lost with damaged archives": self.num_lost} if self.num_lost else {})

    def add_lost(self, images: TarImages) -> None:
        """Count what damaged archives have lost; an error if it is too much, or bad images are not to be skipped."""
        damaged = [archive for archive in images.archives if archive.is_damaged]
        if damaged and self.on_bad_record == "raise":
            raise ValueError(
                f"{len(damaged)} of {len(images.archives)} archives are damaged: {'; '.join(map(str, damaged[:3]))}. "
                "Or train on the images that can be read: --on_bad_image skip"
            )
        self.num_lost += images.num_lost
        self.num_records += images.num_lost
        self.check()

    def note(self, index: int, error: MediaError) -> None:
        """Count image `index`, which cannot be read; an error if there are too many, or they are not to be skipped."""
        if self.on_bad_record == "raise":
            raise ValueError(f"{error}. Or leave such images out: --on_bad_image skip") from error
        if self._image_counts.note_bad(index, error.kind):
            logger.warning("left out: %s", error)
            self.check(error)
