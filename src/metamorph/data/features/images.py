"""All pictures of a data set, each once, as pixels for the tower that caches their features."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Protocol

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from metamorph.data.features.cache import image_key
from metamorph.data.media.stores import MediaError, MediaStore, load_all
from metamorph.data.records import ON_BAD_RECORD, Record, RecordError
from metamorph.data.tasks import Conversation
from metamorph.models.processing_metamorph import MetaMorphProcessor
from metamorph.runs.progress import Progress


logger = logging.getLogger(__name__)

Keyed = list[tuple[tuple[int, int], Tensor]]


class Conversations(Protocol):
    """What is needed of a data set to find its pictures."""

    processor: MetaMorphProcessor

    def __len__(self) -> int: ...

    def record(self, index: int) -> Record:
        """Record `index`."""

    def conversation(self, index: int) -> Conversation:
        """What the task makes of it."""

    def store(self, index: int) -> MediaStore:
        """Where its media are."""


class PictureSet(Dataset[Keyed]):
    """Records that bring a picture which no earlier one has, as keys and pixel values.

    An item is a list of key and float32 `[3, height, width]` for each new picture of one record.

    Args:
        dataset: The data.
        on_bad_record: `raise`, or `skip` to log and leave out.

    Raises:
        RecordError: If a record is bad or a file is missing, with `raise`.
        ValueError: For an unknown `on_bad_record`.
    """

    def __init__(self, dataset: Conversations, on_bad_record: str = "raise") -> None:
        if on_bad_record not in ON_BAD_RECORD:
            raise ValueError(f"--on_bad_record {on_bad_record!r} is unknown; use one of {', '.join(ON_BAD_RECORD)}")
        self.dataset = dataset
        self.on_bad_record = on_bad_record
        self.num_bad = 0
        self.keys: set[tuple[int, int]] = set()
        self._new: list[tuple[int, list[int]]] = []
        self._find_new()

    @property
    def num_images(self) -> int:
        """Number of different pictures."""
        return len(self.keys)

    def __len__(self) -> int:
        return len(self._new)

    def __getitem__(self, place: int) -> Keyed:
        index, numbers = self._new[place]
        try:
            return self._read(index, numbers)
        except RecordError as error:
            if self.on_bad_record == "raise":
                raise
            logger.warning("Leaving out a bad record (%s): %s", error.kind, error)
            return []

    def images(self, num_workers: int = 0) -> Iterator[tuple[tuple[int, int], Tensor]]:
        """Key and pixel values of every picture.

        Args:
            num_workers: Processes that read pictures beside this one.
        """
        loader = DataLoader(self, batch_size=None, num_workers=num_workers)
        with Progress(desc="encoding images", total=self.num_images, unit="image", delay=2) as bar:
            for items in loader:
                yield from items
                bar.update(len(items))

    def _find_new(self) -> None:
        for index in Progress(range(len(self.dataset)), "finding images", unit="record", delay=2):
            try:
                keys = self._keys(index)
            except RecordError as error:
                if self.on_bad_record == "raise":
                    raise
                self.num_bad += 1
                logger.warning("Leaving out a bad record (%s): %s", error.kind, error)
                continue
            numbers = []
            for number, key in enumerate(keys):
                if key not in self.keys:
                    self.keys.add(key)
                    numbers.append(number)
            if numbers:
                self._new.append((index, numbers))

    def _keys(self, index: int) -> list[tuple[int, int]]:
        store = self.dataset.store(index)
        refs = self.dataset.conversation(index).images
        try:
            return [image_key(ref, store) for ref in refs]
        except MediaError as error:
            raise self.dataset.record(index).error(error.kind, error.detail) from error

    def _read(self, index: int, numbers: list[int]) -> Keyed:
        store = self.dataset.store(index)
        images = self.dataset.conversation(index).images
        refs = [images[number] for number in numbers]
        try:
            pictures = load_all(refs, store)
        except MediaError as error:
            raise self.dataset.record(index).error(error.kind, error.detail) from error
        pixels = self.dataset.processor(images=pictures)["pixel_values"]
        return [(image_key(ref, store), values) for ref, values in zip(refs, pixels, strict=True)]
