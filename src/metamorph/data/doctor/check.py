"""The doctor: a dry run over all records that finds what is wrong with data before anything is trained on it."""

from __future__ import annotations

import hashlib
import re
import time
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from torch.utils.data import DataLoader, Dataset

from metamorph.data.doctor.boxes import BOX_WARNINGS, check_boxes
from metamorph.data.media.stores import MediaStore
from metamorph.data.records import DataError, Record, RecordError, Turn, UnsupervisedRecordError
from metamorph.data.remarks import REMARKS, remarks
from metamorph.data.tasks import Conversation
from metamorph.flags.checks import printable
from metamorph.models.processing_metamorph import MetaMorphProcessor
from metamorph.models.sequence.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, IGNORE_INDEX
from metamorph.models.sequence.conversations import split_at_images
from metamorph.runs.progress import Progress


WARNINGS = {
    "over_long": "the record is longer than --model_max_length and would be cut",
    "empty_turn": "a turn has neither text nor image",
    "control_token": "a text holds the name of a control token, which the template adds itself",
    "duplicate_id": "an earlier record of the source has the same id",
    **REMARKS,
    **BOX_WARNINGS,
}
"""What the doctor finds in records that training would accept; `BAD_RECORD_KINDS` has all other kinds."""

_FOUND_MEDIA = ("unreadable_image", "image_too_large", "unreadable_video", "too_few_frames")
"""Kinds of records whose media are there."""
_BATCH = 16
_NO_VALUE = -1
_IMAGE_WRAPPERS = 2
"""`<image_start>` and `<image_end>`: an example is cut by at most one image more than the limit asks for."""


class CheckedDataset(Protocol):
    """What the doctor needs of a data set, which raises the errors of its records (`on_bad_record="raise"`)."""

    @property
    def processor(self) -> MetaMorphProcessor:
        """Makes the sequences."""

    @property
    def model_max_length(self) -> int | None:
        """Longest sequence; None if lengths are not to be judged."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One training example, with its pictures."""

    def record(self, index: int) -> Record:
        """The record it is made of."""

    def conversation(self, index: int) -> Conversation:
        """What the task makes of the record."""

    def measure(self, index: int) -> tuple[int, int, int, int]:
        """Tokens, images, answer images and text targets of the uncut example, without opening a picture."""

    def store(self, index: int) -> MediaStore:
        """Where the media of the record are."""

    def source_name(self, index: int) -> str:
        """Name of the source that the record belongs to."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with one record."""

    kind: str
    """A short name: a kind of `RecordError`, or one of `WARNINGS`."""
    source: str
    """Name of the source."""
    line: int
    """Line of a JSON Lines file, counted from 1; elsewhere the record's index, counted from 0."""
    id: str | None
    """The record's id, if it has one."""
    detail: str
    """What is wrong, where, and how to mend it."""


@dataclass(frozen=True)
class Probe:
    """What the dry run of one record gave."""

    index: int
    """Place of the record in the data set."""
    source: str
    """Name of the source."""
    id_digest: int = 0
    """64-bit digest of the record's id within its source; 0 if it has none."""
    tokens: int = _NO_VALUE
    """Length in tokens before anything is cut; -1 if the record is bad."""
    kept_tokens: int = _NO_VALUE
    """Length as trained on."""
    text_targets: int = _NO_VALUE
    """Tokens with text loss, as trained on."""
    images: int = _NO_VALUE
    """Images before anything is cut."""
    answer_images: int = _NO_VALUE
    """Those of them that the model learns to draw."""
    box_shares: tuple[float, ...] = ()
    """The share of its image that each box covers, 0 to 1."""
    problems: tuple[Problem, ...] = ()
    """What is wrong."""


@dataclass
class Diagnosis:
    """What the dry run of a data set gave."""

    total_records: int
    """Records in the data set, checked or not."""
    probes: np.ndarray
    """A structured array with the fields of `PROBE_FIELDS`, one row for each checked record."""
    sources: list[str]
    """Names of the sources; `probes["source"]` counts in this list."""
    problems: list[Problem]
    """Everything that is wrong, in the order of the records."""
    seconds: float
    """How long the check took."""
    box_shares: np.ndarray
    """float32 `[boxes]`: the share of its image that each box covers, 0 to 1."""
    model_max_length: int | None = None
    """Longest sequence; None if lengths were not judged."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What the records were checked with, for the report."""
    note: str = ""
    """What the reader of the report must know about it."""

    @property
    def num_ok(self) -> int:
        """Number of checked records without any problem."""
        return int((self.probes["problems"] == 0).sum())

    def by_kind(self) -> dict[str, int]:
        """Number of problems of each kind, the most frequent first."""
        return dict(Counter(problem.kind for problem in self.problems).most_common())


PROBE_FIELDS = np.dtype(
    [
        ("index", np.int64),
        ("source", np.int32),
        ("tokens", np.int32),
        ("kept_tokens", np.int32),
        ("text_targets", np.int32),
        ("images", np.int32),
        ("answer_images", np.int32),
        ("problems", np.int32),
    ]
)
"""What is kept of each record: 36 bytes, so that ten million records fit into memory."""


def check_dataset(dataset: CheckedDataset, *, num_workers: int = 0, limit: int | None = None) -> Diagnosis:
    """Build every example as training would, and note what is wrong.

    Args:
        dataset: The data; it must raise the errors of its records.
        num_workers: Processes that build examples; 0 builds them in this one.
        limit: Check only so many records, evenly spread; None checks all.

    Returns:
        Lengths of all checked records, and all problems.

    Raises:
        DataError: If a source names media and not a single file of them is there.
        ValueError: If `limit` is below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"--limit {limit} must be at least 1")
    started = time.monotonic()
    total = len(dataset)
    chosen = range(total) if limit is None or limit >= total else np.linspace(0, total - 1, limit).astype(int).tolist()
    rows = np.zeros(len(chosen), dtype=PROBE_FIELDS)
    digests = np.zeros(len(chosen), dtype=np.uint64)
    names: dict[str, int] = {}
    problems: list[tuple[int, Problem]] = []
    box_shares = array("f")
    for place, probe in enumerate(_probes(dataset, chosen, num_workers)):
        number = names.setdefault(probe.source, len(names))
        rows[place] = (
            probe.index,
            number,
            probe.tokens,
            probe.kept_tokens,
            probe.text_targets,
            probe.images,
            probe.answer_images,
            len(probe.problems),
        )
        digests[place] = probe.id_digest
        box_shares.extend(probe.box_shares)
        problems += [(place, problem) for problem in probe.problems]
    for place, first in _repeated(digests):
        rows[place]["problems"] += 1
        problems.append((place, _duplicate(dataset, int(rows[place]["index"]), int(rows[first]["index"]))))
    problems.sort(key=lambda item: item[0])
    _refuse_wrong_folder(rows, list(names), [problem for _, problem in problems])
    return Diagnosis(
        total_records=total,
        probes=rows,
        sources=list(names),
        problems=[problem for _, problem in problems],
        seconds=time.monotonic() - started,
        box_shares=np.array(box_shares, dtype=np.float32),
        model_max_length=dataset.model_max_length,
    )


class _DryRun(Dataset[Probe]):
    """Records as probes instead of examples, for a data loader."""

    def __init__(self, dataset: CheckedDataset, indices: Sequence[int]) -> None:
        self.dataset = dataset
        self.indices = indices
        self.control_tokens = _control_tokens(dataset.processor)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> Probe:
        index = int(self.indices[place])
        source = self.dataset.source_name(index)
        found: list[tuple[str, str]] = []
        where, record_id = "", None
        lengths: tuple[int, int, int] | None = None
        example: dict[str, Any] | None = None
        shares: list[float] = []
        try:
            record = self.dataset.record(index)
            where, record_id = record.where, record.id
            conversation = self.dataset.conversation(index)
            found += _faults_of_turns(conversation.turns, self.control_tokens)
            found += remarks(record, conversation.turns, [ref.path for ref in conversation.images])
            example = self.dataset[index]
            lengths = self._lengths(index, example)
            faults, shares = check_boxes(conversation.images, self.dataset.store(index))
            found += faults
        except RecordError as error:
            where, record_id = error.where, error.record_id or record_id
            found.insert(0, (error.kind, error.detail))
            if isinstance(error, UnsupervisedRecordError):  # perhaps because it was cut
                lengths = self.dataset.measure(index)[:3]
        limit = self.dataset.model_max_length
        if lengths is not None and limit is not None and lengths[0] > limit:
            found.append(("over_long", _cut(lengths, example, limit)))
        record_id = None if record_id is None or record_id == where else printable(record_id)
        line = line_of(where, index)
        problems = tuple(Problem(kind, source, line, record_id, printable(detail)) for kind, detail in found)
        digest = 0 if record_id is None else _digest(source, record_id)
        if example is None or lengths is None:
            return Probe(index, source, digest, problems=problems)
        return Probe(
            index,
            source,
            digest,
            tokens=lengths[0],
            kept_tokens=len(example["input_ids"]),
            text_targets=int((example["labels"] != IGNORE_INDEX).sum()),
            images=lengths[1],
            answer_images=lengths[2],
            box_shares=tuple(shares),
            problems=problems,
        )

    def _lengths(self, index: int, example: dict[str, Any]) -> tuple[int, int, int]:
        """Tokens, images and answer images before any cut; measured anew only if the example may have been cut."""
        count = self.dataset.processor.num_image_tokens
        tokens, limit = len(example["input_ids"]), self.dataset.model_max_length
        if limit is not None and tokens > limit - count - _IMAGE_WRAPPERS:
            return self.dataset.measure(index)[:3]
        images = example.get("pixel_values")
        answers = int(example["visual_target_mask"].sum()) // count
        return tokens, 0 if images is None else len(images), answers


def _probes(dataset: CheckedDataset, indices: Sequence[int], num_workers: int) -> Iterator[Probe]:
    loader: DataLoader[Probe] = DataLoader(
        _DryRun(dataset, indices),
        batch_size=_BATCH,
        num_workers=num_workers,
        collate_fn=list,
    )
    with Progress(desc="checking records", total=len(indices), unit="record", delay=2) as bar:
        for batch in loader:
            yield from batch
            bar.update(len(batch))


def line_of(where: str, index: int) -> int:
    """The number at the end of `file:12` or `file[12]`; `index` if there is none, as for samples in a tar."""
    match = None if ".tar:" in where else re.search(r":(\d+)$|\[(\d+)\]$", where)
    return index if match is None else int(match[1] or match[2])


def _faults_of_turns(turns: Sequence[Turn], control_tokens: re.Pattern[str]) -> Iterator[tuple[str, str]]:
    """Kind and detail of what is odd in the texts."""
    for number, turn in enumerate(turns, 1):
        parts = split_at_images(turn.text)
        texts = [part for part in parts if isinstance(part, str)]
        if not "".join(texts).strip() and len(texts) == len(parts):
            learnt = "only the end of the turn would be learnt" if turn.role == "assistant" else "it says nothing"
            yield "empty_turn", f"turn {number} ({turn.role}) is empty: {learnt}; write a text or remove the record"
        names = sorted({match[0] for text in texts for match in control_tokens.finditer(text)})
        if names:
            yield (
                "control_token",
                f"turn {number} ({turn.role}) holds {', '.join(names)} as text; it would be spelt letter by letter, "
                "because the template adds control tokens itself: remove it",
            )


def _control_tokens(processor: MetaMorphProcessor) -> re.Pattern[str]:
    """Matches the names of the tokens that the template writes; a bare `<image>` is a marker and none of them."""
    names = processor.template.control_tokens - processor.template.thought_tokens
    names |= {DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN}
    # Short ones are ordinary markup: <s> strikes out, <b> is bold.
    return re.compile("|".join(re.escape(name) for name in sorted(names, key=len, reverse=True) if len(name) > 4))


def _cut(lengths: tuple[int, int, int], example: dict[str, Any] | None, limit: int) -> str:
    """What training would cut off, in words."""
    tokens, images, _ = lengths
    text = f"the record has {tokens} tokens, more than --model_max_length {limit}: "
    if example is None:
        return f"{text}it cannot be cut to that length so that something is left to learn; shorten or split it"
    visual = example.get("pixel_values")
    lost = images - (0 if visual is None else len(visual))
    dropped = f" and {lost} of {images} image(s)" if lost else ""
    return f"{text}its last {tokens - len(example['input_ids'])} tokens{dropped} would be cut off; shorten or split it"


def _refuse_wrong_folder(rows: np.ndarray, names: Sequence[str], problems: Sequence[Problem]) -> None:
    """Stop when all media of a source are missing: then the folder is wrong, and not each of its records."""
    missing: dict[str, list[Problem]] = {}
    for problem in problems:
        if problem.kind.startswith("missing_"):
            missing.setdefault(problem.source, []).append(problem)
    found = {names[number] for number in rows["source"][rows["images"] > 0].tolist()}
    found |= {problem.source for problem in problems if problem.kind in _FOUND_MEDIA}
    for source, gone in missing.items():
        if source not in found:
            raise DataError(
                f"none of the {len(gone)} records of {source} with images or videos has its files, so --image-folder "
                f"is wrong. The first, {source}:{gone[0].line}: {gone[0].detail}"
            )


def _digest(source: str, record_id: str) -> int:
    """64 bits that stand for an id in its source; never 0."""
    text = f"{source}\0{record_id}".encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") or 1


def _repeated(digests: np.ndarray) -> Iterator[tuple[int, int]]:
    """Place of each repeated value other than 0, and of its first occurrence."""
    order = np.argsort(digests, kind="stable")
    ordered = digests[order]
    is_repeated = np.flatnonzero((ordered[1:] == ordered[:-1]) & (ordered[1:] != 0)) + 1
    firsts = np.searchsorted(ordered, ordered[is_repeated])
    yield from zip(order[is_repeated].tolist(), order[firsts].tolist(), strict=True)


def _duplicate(dataset: CheckedDataset, index: int, first: int) -> Problem:
    where, record_id = _place(dataset, index)
    first_where, _ = _place(dataset, first)
    detail = f"the id is that of {first_where}, too; give each record an id of its own"
    record_id = None if record_id is None else printable(record_id)
    return Problem("duplicate_id", dataset.source_name(index), line_of(where, index), record_id, detail)


def _place(dataset: CheckedDataset, index: int) -> tuple[str, str | None]:
    """`where` and id of a record, be it good or bad."""
    try:
        record = dataset.record(index)
    except RecordError as error:
        return error.where, error.record_id
    return record.where, record.id
