"""LLaVA records: parsed into typed values, with errors that name the place, the record and the mend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from metamorph.models.constants import DEFAULT_IMAGE_TOKEN


ROLE_OF_SPEAKER = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}
"""The values of `"from"`, and the roles that they mean."""

ON_BAD_RECORD = ("raise", "skip")
"""The values of `--on_bad_record`."""

BAD_RECORD_KINDS = (
    "broken_line",
    "bad_field",
    "role_order",
    "image_count",
    "missing_image",
    "unreadable_image",
    "outside_folder",
    "unsupervised",
)
"""What can be wrong with a record; bad records are counted by these names."""


class RecordError(ValueError):
    """A record that cannot be used; made with [`RecordError.at`].

    The message alone is enough to make one, because a data loader does so with the errors of its workers.
    """

    kind: str = "bad_field"
    """One of `BAD_RECORD_KINDS`."""
    where: str = ""
    """File and line (or index) of the record."""
    record_id: str | None = None
    """The record's id, if it could be read."""

    @classmethod
    def at(cls, where: str, kind: str, detail: str, record_id: str | None = None) -> RecordError:
        """Make the error of the record at `where`; `detail` tells what is wrong and how to mend it."""
        error = cls(f"{where if record_id is None else f'{where} (id {record_id!r})'}: {detail}")
        error.kind, error.where, error.record_id = kind, where, record_id
        return error


class UnsupervisedRecordError(RecordError):
    """A record without anything to learn: no text label and no visual target."""


class DataError(ValueError):
    """A source of data that cannot be used as a whole."""


@dataclass(frozen=True)
class Turn:
    """What one speaker says."""

    role: str
    """`system`, `user` or `assistant`."""
    text: str
    """The text, with a marker for each image."""

    def as_message(self) -> dict[str, str]:
        """The turn as the processor expects it."""
        return {"role": self.role, "content": self.text}


@dataclass(frozen=True)
class Record:
    """One conversation and the paths of its images."""

    id: str
    """The record's own id, or its place in the file."""
    where: str
    """File and line (or index), for messages."""
    images: tuple[str, ...]
    """Paths as written in the record, in the order of the markers."""
    turns: tuple[Turn, ...]


def parse_record(value: Any, where: str) -> Record:
    """Check a LLaVA record and turn it into a [`Record`].

    Args:
        value: `{"id", "image": absent | path | list of paths, "conversations": [{"from", "value"}, ...]}`.
        where: File and line (or index) of the record.

    Raises:
        RecordError: If a field is missing or wrong, turns are out of order, or images and markers differ in number.
    """
    if not isinstance(value, Mapping):
        raise RecordError.at(where, "bad_field", f"a record must be a JSON object, not {_type(value)}")
    record_id = str(value["id"]) if value.get("id") is not None else where
    try:
        images = _parse_images(value.get("image"))
        turns = _parse_turns(value.get("conversations"))
        _check_order(turns)
        _check_markers(turns, images)
    except _Problem as problem:
        raise RecordError.at(where, problem.kind, problem.detail, record_id) from None
    return Record(id=record_id, where=where, images=images, turns=turns)


class _Problem(Exception):
    """What is wrong, before the place is known."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind
        self.detail = detail


def _parse_images(value: Any) -> tuple[str, ...]:
    paths = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
        raise _Problem("bad_field", f'"image" must be a path or a list of paths, not {value!r:.80}')
    return tuple(paths)


def _parse_turns(value: Any) -> tuple[Turn, ...]:
    if not isinstance(value, list) or not value:
        raise _Problem(
            "bad_field",
            'the record needs "conversations": a list of {"from": "human" or "gpt", "value": text}, '
            f"not {'nothing' if value is None else repr(value)[:80]}",
        )
    turns = []
    for number, turn in enumerate(value, 1):
        if not isinstance(turn, Mapping):
            raise _Problem("bad_field", f"turn {number} must be a JSON object, not {_type(turn)}")
        speaker, text = turn.get("from"), turn.get("value")
        if not isinstance(speaker, str) or speaker not in ROLE_OF_SPEAKER:
            raise _Problem(
                "bad_field", f'turn {number} has "from": {speaker!r}; use one of {", ".join(ROLE_OF_SPEAKER)}'
            )
        if not isinstance(text, str):
            raise _Problem("bad_field", f'turn {number} has "value": {text!r:.80}; it must be a string')
        turns.append(Turn(ROLE_OF_SPEAKER[speaker], text))
    return tuple(turns)


def _check_order(turns: Sequence[Turn]) -> None:
    """A system turn may come first; then human and gpt take turns, and a human begins."""
    expected = "user"
    for number, turn in enumerate(turns, 1):
        if turn.role == "system" and number == 1:
            continue
        if turn.role != expected:
            raise _Problem(
                "role_order",
                f"turn {number} is spoken by the {turn.role} where the {expected} is expected; a conversation is: "
                "system (optional), then human and gpt in turns; join or remove turns",
            )
        expected = "assistant" if expected == "user" else "user"


def _check_markers(turns: Sequence[Turn], images: Sequence[str]) -> None:
    markers = sum(turn.text.count(DEFAULT_IMAGE_TOKEN) for turn in turns)
    if markers != len(images):
        raise _Problem(
            "image_count",
            f'the turns hold {markers} {DEFAULT_IMAGE_TOKEN} marker(s), but "image" names {len(images)} image(s); '
            "write exactly one marker where each image belongs",
        )


def _type(value: Any) -> str:
    return type(value).__name__
