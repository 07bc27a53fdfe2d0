"""Records as training examples: one index, one record, never a neighbour in its place."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset
from tqdm import tqdm

from metamorph.data.media import MediaError, load_image, resolve_image_path
from metamorph.data.record_log import RecordLog
from metamorph.data.records import (
    ON_BAD_RECORD,
    DataError,
    Record,
    RecordError,
    UnsupervisedRecordError,
    check_conversation,
    parse_record,
)
from metamorph.data.sources import Source, open_source
from metamorph.models.conversations import EncodedConversation
from metamorph.models.processing_metamorph import MetaMorphProcessor


logger = logging.getLogger(__name__)

_SHOWN = 10
"""Problems that an error message lists; it counts the others."""
_WRONG_FOLDER = 1000
"""So many image paths, all of them missing, are enough to know that the folder is wrong."""


class TooManyBadRecordsError(DataError):
    """More records are bad than `--max_bad_fraction` allows."""


class ConversationDataset(Dataset[dict[str, Any]]):
    """LLaVA records as training examples, with random access.

    All fields are checked at once, and that all image files are there, so that neither a typing error nor a wrong
    folder shows after an hour only.

    An example is `{"id": str, "input_ids": int64 [sequence], "labels": int64 [sequence], "visual_target_mask":
    bool [sequence], "pixel_values": float32 [images, 3, height, width]}`, without `pixel_values` if it has no image.
    With `on_bad_record="skip"` a bad record gives `{"id": str, "skipped": kind}`, which the collator leaves out.

    Args:
        source: A file of LLaVA records (JSON Lines or a JSON array), or an opened source.
        processor: Makes the sequences.
        image_folder: Folder of relative image paths; by default the folder of the file.
        model_max_length: Longest sequence; longer ones are cut as `encode_conversation` says, and counted.
        on_bad_record: `raise`, or `skip` to count, log and leave out.
        max_bad_fraction: Largest share of bad records with `skip`; above it training stops.

    Raises:
        DataError: If the source is unusable; with `on_bad_record="raise"` also if any record is bad.
        ValueError: For a value that is not allowed.
    """

    def __init__(
        self,
        source: Source | str | os.PathLike[str],
        processor: MetaMorphProcessor,
        image_folder: str | os.PathLike[str] | None = None,
        model_max_length: int | None = None,
        *,
        on_bad_record: str = "raise",
        max_bad_fraction: float = 0.01,
    ) -> None:
        if on_bad_record not in ON_BAD_RECORD:
            raise ValueError(f"--on_bad_record {on_bad_record!r} is unknown; use one of {', '.join(ON_BAD_RECORD)}")
        if not 0 <= max_bad_fraction <= 1:
            raise ValueError(f"--max_bad_fraction must be between 0 and 1, not {max_bad_fraction}")
        self.source = open_source(source) if isinstance(source, (str, os.PathLike)) else source
        self.processor = processor
        self.image_folder = Path(image_folder) if image_folder is not None else self.source.path.parent
        self.model_max_length = model_max_length
        self.on_bad_record = on_bad_record
        self.max_bad_fraction = max_bad_fraction
        self.log = RecordLog(len(self.source))
        if not self.image_folder.is_dir():
            raise DataError(f"--image_folder {self.image_folder} is not a folder")
        self._check_ahead()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Build the example of record `index`.

        Raises:
            RecordError: If the record is bad, with `on_bad_record="raise"`.
            TooManyBadRecordsError: If more than `max_bad_fraction` of all records are bad, with `skip`.
        """
        try:
            return self._build(index)
        except RecordError as error:
            if self.on_bad_record == "raise":
                raise
            self._skip(index, error)
            return {"id": error.record_id or error.where, "skipped": error.kind}

    def record(self, index: int) -> Record:
        """Read and check record `index`, without its images.

        Raises:
            RecordError: If the record is bad.
        """
        raw = self.source[index]
        record = parse_record(raw.value, raw.where)
        check_conversation(record, record.turns, len(record.images))
        return record

    def statistics(self) -> dict[str, Any]:
        """What has been met so far, over all workers: `{"records", "bad", "truncated", "dropped_images"}`."""
        return {
            "records": len(self),
            "bad": self.log.bad_by_kind(),
            "truncated": self.log.num_truncated,
            "dropped_images": self.log.num_dropped_images,
        }

    def _build(self, index: int) -> dict[str, Any]:
        record = self.record(index)
        try:
            images = [load_image(resolve_image_path(path, self.image_folder)) for path in record.images]
        except MediaError as error:
            raise _record_error(error.kind, error.detail, record) from error
        try:
            encoded = self.processor.encode_conversation(
                [turn.as_message() for turn in record.turns], images, model_max_length=self.model_max_length
            )
        except ValueError as error:  # the template cannot express this order of roles
            raise _record_error("role_order", str(error), record) from error
        if encoded.truncated:
            self._note_truncated(index, record, encoded)
        if not encoded.is_supervised:
            raise self._unsupervised(record, encoded)
        example = {
            "id": record.id,
            "input_ids": encoded.input_ids,
            "labels": encoded.labels,
            "visual_target_mask": encoded.visual_target_mask,
        }
        if encoded.pixel_values is not None:
            example["pixel_values"] = encoded.pixel_values
        return example

    def _unsupervised(self, record: Record, encoded: EncodedConversation) -> RecordError:
        detail = "the record has no gpt turn, so there is nothing to learn; add an answer or remove the record"
        if encoded.truncated:
            detail = (
                f"nothing of the answer is left within --model_max_length {self.model_max_length}; raise it or shorten "
                "the record"
            )
        return UnsupervisedRecordError.at(record.where, "unsupervised", detail, record.id)

    def _note_truncated(self, index: int, record: Record, encoded: EncodedConversation) -> None:
        logger.log(
            logging.DEBUG if self.log.num_truncated else logging.WARNING,
            "%s (id %r) was cut to --model_max_length %s; %d image(s) dropped. Further cuts are counted.",
            record.where,
            record.id,
            self.model_max_length,
            encoded.num_dropped_images,
        )
        self.log.note_truncated(index, encoded.num_dropped_images)

    def _skip(self, index: int, error: RecordError) -> None:
        """Count and log a bad record, and stop when there are too many."""
        self.log.note_bad(index, error.kind)
        logger.warning("Skipping a bad record (%s): %s", error.kind, error)
        if self.log.num_bad > self.max_bad_fraction * len(self):
            raise TooManyBadRecordsError(
                f"{self.log.num_bad} of {len(self)} records are bad, more than --max_bad_fraction "
                f"{self.max_bad_fraction} allows: {self.log.bad_by_kind()}. The last one: {error}"
            ) from error

    def _check_ahead(self) -> None:
        """Find all broken lines, bad fields and missing files; no image is opened."""
        problems: dict[int, RecordError] = dict(self.source.broken)
        num_paths = num_missing = 0
        name = f"Checking {self.source.path.name}"
        for index in tqdm(range(len(self)), desc=name, unit="record", delay=2, disable=None):
            if index in problems:
                continue
            try:
                record = self.record(index)
                missing = list(self._missing_files(record))
            except RecordError as error:
                problems[index] = error
                continue
            num_paths += len(record.images)
            num_missing += len(missing)
            if missing:
                detail = f"there is no image file {missing[0]}; is --image_folder {self.image_folder} right?"
                problems[index] = _record_error("missing_image", detail, record)
            if num_missing == num_paths >= _WRONG_FOLDER:
                break
        if num_paths and num_missing == num_paths:
            first = next(error for error in problems.values() if error.kind == "missing_image")
            raise DataError(
                f"none of the {num_paths} image(s) that were looked for is there, so --image_folder "
                f"{self.image_folder} is wrong. The first: {first}"
            )
        if problems and self.on_bad_record == "raise":
            found = [problems[index] for index in sorted(problems)]
            raise DataError(_summary(self.source.path, found, num_missing, num_paths))
        for index in sorted(problems):
            self._skip(index, problems[index])

    def _missing_files(self, record: Record) -> Iterable[Path]:
        try:
            paths = [resolve_image_path(path, self.image_folder) for path in record.images]
        except MediaError as error:
            raise _record_error(error.kind, error.detail, record) from error
        return (path for path in paths if not path.is_file())


def _record_error(kind: str, detail: str, record: Record) -> RecordError:
    return RecordError.at(record.where, kind, detail, record.id)


def _summary(path: Path, problems: list[RecordError], num_missing: int, num_paths: int) -> str:
    lines = "\n  ".join(str(problem) for problem in problems[:_SHOWN])
    more = f"\n  and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    missing = f", and {num_missing} of {num_paths} image file(s) are missing" if num_missing else ""
    return (
        f"{path} has {len(problems)} bad record(s){missing}; correct them, or leave them out with --on_bad_record "
        f"skip:\n  {lines}{more}"
    )
