"""The check of the records before training starts, so that no typo or wrong folder stops a run hours later."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from metamorph.data.doctor.walk import spread, walk
from metamorph.data.records import DataError, RecordError


if TYPE_CHECKING:
    from metamorph.data.examples import ConversationDataset

logger = logging.getLogger(__name__)

MAX_CHECKED = 20_000
"""Most records of a source that are checked, evenly spread; `metamorph data check` checks all of them, in parallel."""
_SHOWN = 10
"""Problems that an error message lists; it counts the others."""
_WRONG_FOLDER = 1000
"""The check stops after this number of media paths if all of them are missing: the folder must be wrong."""


def find_problems(
    dataset: ConversationDataset, indices: Sequence[int] | np.ndarray
) -> tuple[dict[int, RecordError], str]:
    """Parse records, run their task and look for their media files, without opening them.

    Args:
        dataset: The data.
        indices: Which records; at most `MAX_CHECKED` of them are checked.

    Returns:
        The problem of each bad record, and a remark on missing media, for [`summary`].

    Raises:
        DataError: If none of the media files exists.
    """
    if len(indices) > MAX_CHECKED:
        text = "%s: checking %d of %d records; `metamorph data check` checks all of them"
        logger.info(text, dataset.source.path, MAX_CHECKED, len(indices))
    chosen = [int(indices[number]) for number in spread(len(indices), MAX_CHECKED)]
    problems: dict[int, RecordError] = {}
    num_warnings: Counter[str] = Counter()
    first_warning: dict[str, RecordError] = {}
    first_missing: RecordError | None = None
    num_paths = num_missing = 0
    for found in walk(dataset, chosen, f"checking {dataset.source.path}", media_place=dataset.media_place):
        for kind, detail in found.warnings:
            num_warnings[kind] += 1
            first_warning.setdefault(kind, RecordError.at(found.where, kind, detail, found.record_id))
        if found.error is not None:
            problems[found.index] = found.error
        if found.num_missing:
            first_missing = first_missing or found.error
        num_paths += len(found.paths)
        num_missing += found.num_missing
        if num_missing == num_paths >= _WRONG_FOLDER:
            break
    for kind, count in num_warnings.items():
        logger.warning("%s: %s in %d record(s); the first: %s", dataset.source.path, kind, count, first_warning[kind])
    if num_paths and num_missing == num_paths:
        raise DataError(
            f"none of the {num_paths} image(s) or video(s) that were looked for is there, so {dataset.media_place} is "
            f"wrong. The first: {first_missing}"
        )
    return problems, f", and {num_missing} of {num_paths} media file(s) are missing" if num_missing else ""


def summary(place: Path, problems: Sequence[RecordError], remark: str) -> str:
    """The error message for a source with bad records."""
    lines = "\n  ".join(str(problem) for problem in problems[:_SHOWN])
    more = f"\n  and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    return (
        f"{place} has {len(problems)} bad record(s){remark}; correct them, or leave them out with --on_bad_record "
        f"skip:\n  {lines}{more}"
    )
