"""All images of a data set, each once, as pixels for the tower whose features are cached."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from metamorph.data.features.cache import image_key
from metamorph.data.media.stores import load_all, media_of
from metamorph.data.records import ON_BAD_RECORD, RecordError
from metamorph.runs.progress import Progress


if TYPE_CHECKING:
    from metamorph.data.dataset import MixtureDataset

logger = logging.getLogger(__name__)

Keyed = list[tuple[tuple[int, int], Tensor]]


class ImageSet(Dataset[Keyed]):
    """The records with an image that no earlier record has, as keys and pixel values.

    An item is a list of key and float32 `[3, height, width]` for each new image of one record.

    Args:
        dataset: The data.
        on_bad_record: `raise`, or `skip` to log and leave out.

    Raises:
        RecordError: If a record is bad or a file is missing, with `raise`.
        ValueError: For an unknown `on_bad_record`.
    """

    def __init__(self, dataset: MixtureDataset, on_bad_record: str = "raise") -> None:
        if on_bad_record not in ON_BAD_RECORD:
            raise ValueError(f"--on_bad_record {on_bad_record!r} is unknown; use one of {', '.join(ON_BAD_RECORD)}")
        self.dataset = dataset
        self.on_bad_record = on_bad_record
        self.num_bad = 0
        self.keys: set[tuple[int, int]] = set()
        self._new: list[tuple[int, list[int]]] = []  # index of a record, and which of its images are new
        for index in Progress(range(len(dataset)), "finding images", unit="record", delay=2):
            try:
                keys = self._keys(index)
            except RecordError as error:
                self._skip(error)
                self.num_bad += 1
                continue
            new = {key: number for number, key in reversed([*enumerate(keys)]) if key not in self.keys}
            self.keys |= new.keys()
            if new:
                self._new.append((index, sorted(new.values())))

    @property
    def num_images(self) -> int:
        """Number of different images."""
        return len(self.keys)

    def __len__(self) -> int:
        return len(self._new)

    def __getitem__(self, place: int) -> Keyed:
        index, numbers = self._new[place]
        try:
            store = self.dataset.store(index)
            images = self.dataset.conversation(index).images
            refs = [images[number] for number in numbers]
            with media_of(self.dataset.record(index)):
                loaded = load_all(refs, store)
            pixels = self.dataset.processor(images=loaded)["pixel_values"]
            return [(image_key(ref, store), values) for ref, values in zip(refs, pixels, strict=True)]
        except RecordError as error:
            self._skip(error)
            return []

    def images(self, num_workers: int = 0) -> Iterator[tuple[tuple[int, int], Tensor]]:
        """Key and pixel values of every image, read by this number of worker processes."""
        loader = DataLoader(self, batch_size=None, num_workers=num_workers)
        with Progress(desc="encoding images", total=self.num_images, unit="image", delay=2) as bar:
            for items in loader:
                yield from items
                bar.update(len(items))

    def _keys(self, index: int) -> list[tuple[int, int]]:
        store = self.dataset.store(index)
        refs = self.dataset.conversation(index).images
        with media_of(self.dataset.record(index)):
            return [image_key(ref, store) for ref in refs]

    def _skip(self, error: RecordError) -> None:
        if self.on_bad_record == "raise":
            raise error
        logger.warning("Leaving out a bad record (%s): %s", error.kind, error)
