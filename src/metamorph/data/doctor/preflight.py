"""A look at the records before training starts, so that neither a typing error nor a wrong folder shows hours later."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from metamorph.data.media.stores import MediaError, MediaStore
from metamorph.data.records import DataError, Record, RecordError
from metamorph.data.remarks import remarks
from metamorph.data.tasks import Conversation, Task
from metamorph.runs.progress import Progress


logger = logging.getLogger(__name__)

MAX_CHECKED = 20_000
"""So many records of a source are looked at, evenly spread; `metamorph data check` looks at all, in parallel."""
_SHOWN = 10
"""Problems that an error message lists; it counts the others."""
_WRONG_FOLDER = 1000
"""So many media paths, all of them missing, are enough to know that the folder is wrong."""


class Checkable(Protocol):
    """What is needed of a data set to look at it ahead."""

    task: Task

    @property
    def place(self) -> str:
        """Path of the records, for messages."""

    @property
    def media_place(self) -> str:
        """Where media are looked for, for messages."""

    def record(self, index: int) -> Record:
        """Record `index`."""

    def conversation(self, index: int) -> Conversation:
        """What the task makes of it."""

    def store(self, index: int) -> MediaStore:
        """Where its media are."""


def find_problems(dataset: Checkable, indices: Sequence[int] | np.ndarray) -> tuple[dict[int, RecordError], str]:
    """Parse records, run their task and look for their media; no media are opened.

    Args:
        dataset: The data.
        indices: Which records; of more than `MAX_CHECKED` only some are looked at.

    Returns:
        The problem of each bad record, and a remark on missing media, for [`summary`].

    Raises:
        DataError: If no medium that was looked for is there: then the folder is wrong.
    """
    problems: dict[int, RecordError] = {}
    found: dict[str, list[str]] = {}
    num_paths = num_missing = 0
    chosen = _spread(indices, dataset.place)
    for index in Progress(chosen, f"checking {dataset.place}", unit="record", delay=2):
        try:
            record, paths = _media_paths(dataset, index, found)
            missing = _missing(record, paths, dataset.store(index))
        except RecordError as error:
            problems[index] = error
            continue
        num_paths += len(paths)
        num_missing += len(missing)
        if missing:
            problems[index] = _missing_error(dataset, index, record, missing[0])
        if num_missing == num_paths >= _WRONG_FOLDER:
            break
    for kind, remarked in found.items():
        logger.warning("%s: %s in %d record(s); the first: %s", dataset.place, kind, len(remarked), remarked[0])
    if num_paths and num_missing == num_paths:
        first = next(error for error in problems.values() if error.kind.startswith("missing_"))
        raise DataError(
            f"none of the {num_paths} image(s) or video(s) that were looked for is there, so {dataset.media_place} is "
            f"wrong. The first: {first}"
        )
    return problems, f", and {num_missing} of {num_paths} media file(s) are missing" if num_missing else ""


def _spread(indices: Sequence[int] | np.ndarray, place: str) -> list[int]:
    """All of them, or `MAX_CHECKED` evenly spread."""
    if len(indices) <= MAX_CHECKED:
        return [int(index) for index in indices]
    logger.info(
        "%s: looking at %d of %d records; `metamorph data check` looks at all", place, MAX_CHECKED, len(indices)
    )
    return [int(indices[number]) for number in np.linspace(0, len(indices) - 1, MAX_CHECKED).astype(int).tolist()]


def summary(place: str, problems: Sequence[RecordError], remark: str) -> str:
    """What is wrong with the records of a source, in a message of some lines."""
    lines = "\n  ".join(str(problem) for problem in problems[:_SHOWN])
    more = f"\n  and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    return (
        f"{place} has {len(problems)} bad record(s){remark}; correct them, or leave them out with --on_bad_record "
        f"skip:\n  {lines}{more}"
    )


def _media_paths(dataset: Checkable, index: int, found: dict[str, list[str]]) -> tuple[Record, list[str]]:
    """A record and the files that its conversation needs. Videos are not opened, so theirs is not made.

    Remarks on the record are added to `found`, by kind.
    """
    record = dataset.record(index)
    if record.video is not None:
        return record, [record.video]
    conversation = dataset.conversation(index)
    paths = list(dict.fromkeys(image.path for image in conversation.images))
    for kind, detail in remarks(record, conversation.turns, paths):
        found.setdefault(kind, []).append(str(record.error(kind, detail)))
    return record, paths


def _missing(record: Record, paths: Sequence[str], store: MediaStore) -> list[str]:
    try:
        return [path for path in paths if not store.exists(path)]
    except MediaError as error:
        raise record.error(error.kind, error.detail) from error


def _missing_error(dataset: Checkable, index: int, record: Record, path: str) -> RecordError:
    is_video = path == record.video
    kind, what = ("missing_video", "video") if is_video else ("missing_image", "image")
    return record.error(kind, f"there is no {what} file {path}; is {dataset.media_place} right?")
