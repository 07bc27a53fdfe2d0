"""A data set as the doctor wants it: it raises the errors of its records, and never stops because of them."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from PIL import Image

from metamorph.data.dataset import ConversationDataset
from metamorph.data.records import Record
from metamorph.models.processing_metamorph import MetaMorphProcessor


class OpenedData:
    """Training data, opened to be looked at; see `metamorph.data.doctor.CheckedDataset`.

    Args:
        path: What `--data_path` takes.
        processor: Makes the sequences.
        image_folder: Folder of relative image paths; by default the folder of the file.
        model_max_length: Longest sequence; None cuts nothing.

    Raises:
        DataError: If the data is unusable as a whole.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        processor: MetaMorphProcessor,
        image_folder: str | os.PathLike[str] | None = None,
        model_max_length: int | None = None,
    ) -> None:
        self.processor = processor
        self.model_max_length = model_max_length
        with _quiet("metamorph.data.dataset"):
            self._data = ConversationDataset(
                path, processor, image_folder, model_max_length, on_bad_record="skip", max_bad_fraction=1.0
            )
        self._data.on_bad_record = "raise"

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One training example.

        Raises:
            RecordError: If its record is bad.
        """
        with _quiet("metamorph.data.dataset"):
            return self._data[index]

    def record(self, index: int) -> Record:
        """The record that example `index` is made of.

        Raises:
            RecordError: If it is bad.
        """
        return self._data.record(index)

    def measure(self, index: int) -> tuple[int, int, int]:
        """Tokens, images and answer images of the uncut example."""
        record = self.record(index)
        blank = [Image.new("RGB", (1, 1))] * len(record.images)
        encoded = self.processor.encode_conversation([turn.as_message() for turn in record.turns], blank)
        answers = int(encoded.visual_target_mask.sum()) // self.processor.num_image_tokens
        return len(encoded.input_ids), len(blank), answers

    def source_name(self, index: int) -> str:
        """Name of the source of record `index`."""
        return self._data.source.path.name


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Log nothing below an error: what a data set warns of is in the report."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
