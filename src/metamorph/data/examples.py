"""The records of one source as training examples: each index is one record.

A line of a JSONL file becomes ids and labels in these steps (`ConversationDataset.__getitem__`):

1. `sources`: find the line by its offset, and read it as JSON.
2. `fields`: rename fields of other layouts. `records.parse_record`: make a typed `Record`, or an error that names the
   place.
3. `Task.build`: the source's task makes a `Conversation`: messages, and references to images.
4. `media.stores.load_all`: load the images.
5. `MetaMorphProcessor.encode_conversation`: build ids, labels and visual targets together, segment by segment. Text of
   an assistant's turn is a label, all other text and every placeholder is -100, and placeholders of an assistant's
   images are visual targets.
"""

from __future__ import annotations

import hashlib
import logging
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch.utils.data import Dataset

from metamorph.data.bad_records import BadRecordLimit, RecordCounts
from metamorph.data.checks.check import check_before_training
from metamorph.data.features import FeatureCache
from metamorph.data.fields import FieldMap
from metamorph.data.media.stores import FolderStore, MediaStore, load_all, probe, record_errors
from metamorph.data.records import DataError, Record, RecordError, UnsupervisedRecordError, parse_record
from metamorph.data.sources.open import Source, TarSource, open_source
from metamorph.data.tasks import Conversation, get_task, parse_options
from metamorph.flags.checks import printable
from metamorph.models.processing_metamorph import MetaMorphProcessor
from metamorph.models.sequence.conversations import EncodedConversation


logger = logging.getLogger(__name__)


class ConversationDataset(Dataset[dict[str, Any]]):
    """The records of one source as training examples, with random access.

    An example is `{"id": str, "source": str, "input_ids": int64 [sequence], "labels": int64 [sequence],
    "visual_target_mask": bool [sequence], "pixel_values": float32 [images, 3, height, width]}`, without `pixel_values`
    if it has no image. With `features`, it has `"visual_tokens"` `[images, N, D]` instead. With `on_bad_record="skip"`
    a bad record gives `{"id": str, "source": str, "skipped": kind}`, which the collator leaves out.

    The random choices of a task depend on `seed`, the source's name and the record's id (or its index), so they are
    the same in every process and in every epoch.

    Args:
        source: Path or pattern for [`open_source`], or an open source.
        processor: None if only records and conversations are read, not examples.
        image_folder: Folder of relative media paths; by default the folder of the file. Tars contain their media.
        model_max_length: Longest sequence; longer ones are truncated by `encode_conversation`, and counted.
        name: Name in logs and reports; by default that of the file, without suffix.
        max_bad_fraction: Largest share of bad records with `skip`; above it, training stops.
        folder_flag: Name of the flag for `image_folder` in error messages.

    Raises:
        DataError: If the source is unusable; with `on_bad_record="raise"` also if the check finds a bad record.
        ValueError: For a value that is not allowed.
    """

    def __init__(
        self,
        source: Source | str | os.PathLike[str],
        processor: MetaMorphProcessor | None,
        image_folder: str | os.PathLike[str] | None = None,
        model_max_length: int | None = None,
        *,
        task: str = "instruction",
        options: Mapping[str, Any] | None = None,
        name: str | None = None,
        seed: int = 0,
        on_bad_record: str = "raise",
        max_bad_fraction: float = 0.01,
        check: bool = True,
        features: FeatureCache | None = None,
        fields: Mapping[str, Any] | None = None,
        folder_flag: str = "--image_folder",
    ) -> None:
        limit = BadRecordLimit(on_bad_record, max_bad_fraction)
        self.task = get_task(task)
        self.options = parse_options(self.task, options)
        self.source = open_source(source) if isinstance(source, (str, os.PathLike)) else source
        self.processor = cast(MetaMorphProcessor, processor)
        self.image_folder = Path(image_folder) if image_folder is not None else self.source.path.parent
        self.model_max_length = model_max_length
        self.name = printable(name or self.source.path.stem)
        self.seed = seed
        self.features = features
        self.fields = FieldMap(fields)
        self.folder_flag = folder_flag
        self.counts = RecordCounts(len(self.source))
        self._folder = FolderStore(self.image_folder)
        if not self.image_folder.is_dir():
            raise DataError(f"{folder_flag} {self.image_folder} is not a folder")
        self.set_limit(limit, len(self.source))
        if check:
            self.check()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            return self._build(index)
        except RecordError as error:
            if self.limit.on_bad_record == "raise":
                raise
            self._skip(index, error)
            return {"id": error.record_id or error.where, "source": self.name, "skipped": error.kind}

    def locate(self, index: int) -> tuple[ConversationDataset, int]:
        """As that of a mixture, so that both can be walked over and measured."""
        return self, index

    def record(self, index: int) -> Record:
        """Read record `index`, and check the fields that all tasks share; a bad one raises a `RecordError`."""
        raw = self.source[index]
        with self.fields.explains_errors():
            return parse_record(self.fields.apply(raw.value, raw.where), raw.where)

    def conversation(self, index: int) -> Conversation:
        """The conversation that the task builds from record `index`, without opening images or decoding a video.

        Raises:
            RecordError: If the record is bad, or does not fit the task.
        """
        return self._make_conversation(index, self.record(index))

    def store(self, index: int) -> MediaStore:
        """Where the media of record `index` are."""
        return self.source.store(index) if isinstance(self.source, TarSource) else self._folder

    def measure(self, index: int) -> tuple[int, int, int, int]:
        """Numbers of tokens, images, answer images and text targets of example `index` before truncation.

        A bad record raises a `RecordError`.
        """
        record = self.record(index)
        messages = [turn.as_message() for turn in self._make_conversation(index, record).turns]
        try:
            return self.processor.measure_conversation(messages)
        except ValueError as error:
            raise record.error("role_order", str(error)) from error

    def fingerprint(self) -> str:
        """Changes whenever the conversations may have changed: with the files, the task, its options, the seed."""
        parts = [self.source.index.fingerprint(), self.name, self.task.name, repr(self.options), str(self.seed)]
        parts += [repr(self.fields)] if self.fields.names else []
        if self.task.needs_video:  # how many frames there are depends on the files
            parts.append(os.path.abspath(self.image_folder))
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]

    def statistics(self) -> dict[str, Any]:
        """Counts so far, over all workers: `{"records", "bad", "truncated", "dropped_images"}`."""
        return {
            "records": len(self),
            "bad": self.counts.bad_by_kind(),
            "truncated": self.counts.num_truncated,
            "dropped_images": self.counts.num_dropped_images,
        }

    def set_limit(self, limit: BadRecordLimit, num_records: int) -> None:
        """Count the bad records of the `num_records` that are used with `limit`, which other sources share."""
        self.limit = limit
        limit.add(self.counts, num_records)

    def check(self, indices: Sequence[int] | np.ndarray | None = None) -> None:
        """[`check_before_training`][metamorph.data.checks.check.check_before_training], by default of all records.

        Raises:
            TooManyBadRecordsError: With `skip`, if more than `max_bad_fraction` of all records are bad.
        """
        for index, error in check_before_training(self, range(len(self)) if indices is None else indices).items():
            self._skip(index, error)

    @property
    def media_place(self) -> str:
        """Where media files are looked for, for error messages."""
        in_tar = isinstance(self.source, TarSource)
        return "the sample in the tar" if in_tar else f"{self.folder_flag} {self.image_folder}"

    def _make_conversation(self, index: int, record: Record) -> Conversation:
        video = None
        if self.task.needs_video and record.video is not None:  # the task refuses records without one
            with record_errors(record):
                video = probe(record.video, self.store(index))
        own_id = str(index) if record.id == record.where else record.id
        words = [zlib.crc32(text.encode(errors="surrogatepass")) for text in (self.name, own_id)]
        with self.fields.explains_errors():
            return self.task(record, np.random.default_rng([self.seed, *words]), self.options, video)

    def _build(self, index: int) -> dict[str, Any]:
        record = self.record(index)
        conversation = self._make_conversation(index, record)
        images: Sequence[Any] = conversation.images
        if self.features is None:
            with record_errors(record):
                images = load_all(conversation.images, self.store(index))
        try:
            encoded = self.processor.encode_conversation(
                [turn.as_message() for turn in conversation.turns],
                images,
                model_max_length=self.model_max_length,
                with_pixels=self.features is None,
            )
        except ValueError as error:  # the template cannot express this order of roles
            raise record.error("role_order", str(error)) from error
        if encoded.truncated:
            self._note_truncated(index, record, encoded)
        if not encoded.is_supervised:
            fault = "the record has no gpt turn, so there is nothing to learn; add an answer or remove the record"
            if encoded.truncated:
                limit = f"--model_max_length {self.model_max_length}"
                fault = f"nothing of the answer is left within {limit}; raise it or shorten the record"
            raise UnsupervisedRecordError.at(record.where, "unsupervised", fault, record.id)
        example = {
            "id": record.id,
            "source": self.name,
            "input_ids": encoded.input_ids,
            "labels": encoded.labels,
            "visual_target_mask": encoded.visual_target_mask,
        }
        if encoded.pixel_values is not None:
            example["pixel_values"] = encoded.pixel_values
        if self.features is not None:
            kept = conversation.images[: len(images) - encoded.num_dropped_images]
            with record_errors(record):
                tokens = self.features.read(kept, self.store(index))
            if tokens is not None:
                example["visual_tokens"] = tokens
        return example

    def _note_truncated(self, index: int, record: Record, encoded: EncodedConversation) -> None:
        logger.log(
            logging.DEBUG if self.counts.num_truncated else logging.WARNING,
            "%s (id %r) was truncated to --model_max_length %s; %d image(s) dropped. Further ones are only counted.",
            record.where,
            record.id,
            self.model_max_length,
            encoded.num_dropped_images,
        )
        self.counts.note_truncated(index, encoded.num_dropped_images)

    def _skip(self, index: int, error: RecordError) -> None:
        """Count and log a bad record (in later epochs at level DEBUG), and stop if there are too many."""
        is_new = self.counts.note_bad(index, error.kind)
        logger.log(logging.WARNING if is_new else logging.DEBUG, "Skipping a bad record (%s): %s", error.kind, error)
        self.limit.check(last=error)
