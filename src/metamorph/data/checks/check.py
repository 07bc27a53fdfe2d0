"""Checks of the records before training: all of them by `metamorph data check`, and some when a run starts."""

from __future__ import annotations

import hashlib
import logging
import re
import time
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from metamorph.data.checks.walk import BOX_WARNINGS, Finding, spread, walk
from metamorph.data.records import DataError, RecordError
from metamorph.data.remarks import REMARKS
from metamorph.flags.checks import printable


if TYPE_CHECKING:
    from metamorph.data.dataset import MixtureDataset
    from metamorph.data.examples import ConversationDataset

logger = logging.getLogger(__name__)

WARNINGS = {
    "over_long": "the record is longer than --model_max_length and would be cut",
    "empty_turn": "a turn has neither text nor image",
    "control_token": "a text contains the name of a control token, which the template adds itself",
    "duplicate_id": "an earlier record of the source has the same id",
    **REMARKS,
    **BOX_WARNINGS,
}
"""Problems of records that training would accept; `BAD_RECORD_KINDS` has all other kinds."""

MAX_CHECKED = 20_000
"""Most records of a source that are checked, evenly spread; `metamorph data check` checks all of them, in parallel."""
_SHOWN = 10
"""Problems that an error message lists; it counts the others."""
_WRONG_FOLDER = 1000
"""The check stops after this number of media paths if all of them are missing: the folder must be wrong."""
_FOUND_MEDIA = ("unreadable_image", "image_too_large", "unreadable_video", "too_few_frames")
"""Kinds of records whose media files exist."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with one record."""

    kind: str
    """A kind of `RecordError`, or one of `WARNINGS`."""
    source: str
    line: int
    """Line of a JSON Lines file, counted from 1; elsewhere the record's index, counted from 0."""
    id: str | None
    """The record's id, if it has one."""
    detail: str
    """What is wrong, where, and how to fix it."""


_NUMBERS = ("source", "tokens", "kept_tokens", "text_targets", "images", "answer_images", "problems")
ROW = np.dtype([("index", np.int64), *((name, np.int32) for name in _NUMBERS)])
"""Numbers on one record: 36 bytes, so that ten million records fit into memory. `tokens`, `images` and `answer_images`
are those before truncation; the five sizes are -1 if the record is bad."""


@dataclass
class Diagnosis:
    """The result of checking a data set."""

    total_records: int
    """Records in the data set, checked or not."""
    rows: np.ndarray
    """A structured array of type `ROW`, one row for each checked record."""
    sources: list[str]
    """Names of the sources; `rows["source"]` is an index into this list."""
    problems: list[Problem]
    """In the order of the records."""
    seconds: float
    """How long the check took."""
    box_shares: np.ndarray
    """float32 `[boxes]`: the share of its image that each box covers, 0 to 1."""
    model_max_length: int | None = None
    """Longest sequence; None if lengths were not judged."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What the records were checked with, for the report."""
    note: str = ""
    """A note for the reader of the report."""

    @property
    def num_ok(self) -> int:
        """Number of checked records without any problem."""
        return int((self.rows["problems"] == 0).sum())

    def by_kind(self) -> dict[str, int]:
        """Number of problems of each kind, the most frequent first."""
        return dict(Counter(problem.kind for problem in self.problems).most_common())


def check_dataset(dataset: MixtureDataset, *, num_workers: int = 0, limit: int | None = None) -> Diagnosis:
    """Build every example as training would (or `limit` of them, evenly spread), and collect lengths and problems.

    Raises:
        DataError: If a source names media and none of their files exists.
        ValueError: If `limit` is below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"--limit {limit} must be at least 1")
    started = time.monotonic()
    total = len(dataset)
    chosen = spread(total, total if limit is None else limit)
    rows = np.zeros(len(chosen), dtype=ROW)
    digests = np.zeros(len(chosen), dtype=np.uint64)
    names: dict[str, int] = {}
    problems: list[tuple[int, Problem]] = []
    box_shares = array("f")
    for place, found in enumerate(walk(dataset, chosen, "checking records", num_workers=num_workers)):
        source = dataset.locate(found.index)[0].name
        own = _problems(found, source)
        rows[place] = (found.index, names.setdefault(source, len(names)), *found.sizes, len(own))
        digests[place] = _digest(source, found)
        box_shares.extend(found.box_shares)
        problems += [(place, problem) for problem in own]
    _, firsts, inverse = np.unique(digests, return_index=True, return_inverse=True)
    first = firsts[inverse]  # (records,): the place where each id occurs first
    for place in np.flatnonzero((digests != 0) & (first != np.arange(len(first)))).tolist():
        rows[place]["problems"] += 1
        problems.append((place, _duplicate(dataset, int(rows[place]["index"]), int(rows[first[place]]["index"]))))
    problems.sort(key=lambda item: item[0])
    diagnosis = Diagnosis(
        total_records=total,
        rows=rows,
        sources=list(names),
        problems=[problem for _, problem in problems],
        seconds=time.monotonic() - started,
        box_shares=np.array(box_shares, dtype=np.float32),
        model_max_length=dataset.model_max_length,
    )
    _refuse_wrong_folder(diagnosis)
    return diagnosis


def line_of(where: str, index: int) -> int:
    """The number at the end of `file:12` or `file[12]`; `index` if there is none, as for samples in a tar."""
    match = None if ".tar:" in where else re.search(r":(\d+)$|\[(\d+)\]$", where)
    return index if match is None else int(match[1] or match[2])


def _problems(found: Finding, source: str) -> list[Problem]:
    errors = [] if found.error is None else [(found.error.kind, found.error.detail)]
    line, record_id = line_of(found.where, found.index), _own_id(found)
    return [Problem(kind, source, line, record_id, printable(detail)) for kind, detail in (*errors, *found.warnings)]


def _own_id(found: Finding) -> str | None:
    """The id in the record; without one, its place is its id."""
    return None if found.record_id in (None, found.where) else printable(str(found.record_id))


def _refuse_wrong_folder(diagnosis: Diagnosis) -> None:
    """Stop if all media of a source are missing: then the folder is wrong, not each record."""
    missing: dict[str, list[Problem]] = {}
    found = {diagnosis.sources[number] for number in diagnosis.rows["source"][diagnosis.rows["images"] > 0].tolist()}
    for problem in diagnosis.problems:
        if problem.kind.startswith("missing_"):
            missing.setdefault(problem.source, []).append(problem)
        elif problem.kind in _FOUND_MEDIA:
            found.add(problem.source)
    for source, gone in missing.items():
        if source not in found:
            raise DataError(
                f"none of the {len(gone)} records of {source} with images or videos has its files, so --image-folder "
                f"is wrong. The first, {source}:{gone[0].line}: {gone[0].detail}"
            )


def _digest(source: str, found: Finding) -> int:
    """64 bits for an id in its source; 0 without an id."""
    record_id = _own_id(found)
    if record_id is None:
        return 0
    text = f"{source}\0{record_id}".encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") or 1


def _duplicate(dataset: MixtureDataset, index: int, first: int) -> Problem:
    where, record_id = _place(dataset, index)
    detail = f"the id is also that of {_place(dataset, first)[0]}; give each record its own id"
    source = dataset.locate(index)[0].name
    return Problem("duplicate_id", source, line_of(where, index), printable(record_id), detail)


def _place(dataset: MixtureDataset, index: int) -> tuple[str, str]:
    """`where` and id of a record, good or bad."""
    try:
        source, number = dataset.locate(index)
        record = source.record(number)
    except RecordError as error:
        return error.where, str(error.record_id)
    return record.where, record.id


def check_before_training(dataset: ConversationDataset, indices: Sequence[int] | np.ndarray) -> dict[int, RecordError]:
    """Parse records, run their task and look for their media files, without opening them.

    At most `MAX_CHECKED` of the `indices` are checked.

    Returns:
        The problem of each bad record, for `on_bad_record="skip"`.

    Raises:
        DataError: If none of the media files exists; with `on_bad_record="raise"` also if any record is bad.
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
    problems = dict(sorted(problems.items()))
    if problems and dataset.limit.on_bad_record == "raise":
        remark = f", and {num_missing} of {num_paths} media file(s) are missing" if num_missing else ""
        lines = "\n  ".join(str(problem) for problem in list(problems.values())[:_SHOWN])
        more = f"\n  and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise DataError(
            f"{dataset.source.path} has {len(problems)} bad record(s){remark}; correct them, or leave them out with "
            f"--on_bad_record skip:\n  {lines}{more}"
        )
    return problems
