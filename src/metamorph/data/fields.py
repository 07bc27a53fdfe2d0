"""`fields:` of a source: reads records of another layout like those that `docs/data.md` describes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from metamorph.data.records import VIDEO_MARKER, RecordError
from metamorph.flags.parser import nearest
from metamorph.models.sequence.constants import DEFAULT_IMAGE_TOKEN


OPTIONAL = ("id", "image", "video", "system")
"""Fields that some records of a source may lack."""
NEEDED = ("conversations", "caption", "source", "instruction", "target", "target_instances")
"""Fields that every record must have if `fields:` names them."""
OF_TURNS = ("from", "value")
SPEAKERS = ("human", "gpt")
"""Values of `from`."""
IGNORE = "ignore"
"""Names a list of fields to leave unread."""
NAMES = (*OPTIONAL, *NEEDED, *OF_TURNS, *SPEAKERS, IGNORE)
"""The keys of `fields:`."""

_MEDIA = ("image", "video", "source", "target")
_PATHS = ("path", "url", "image", "image_url", "video", "video_url")
"""Keys of the path in a part of a turn, or in an image that is an object."""
_TEXT_PARTS = ("text", "input_text", "output_text")
_MARKERS = {
    "image": DEFAULT_IMAGE_TOKEN,
    "image_url": DEFAULT_IMAGE_TOKEN,
    "input_image": DEFAULT_IMAGE_TOKEN,
    "video": VIDEO_MARKER,
    "video_url": VIDEO_MARKER,
}
"""Types of parts other than text, and their markers in the text."""
_SPEAKERS_OF_OTHERS = {"developer": "system"}


def unknown_key(key: Any, known: Sequence[str]) -> str:
    """Error text for a key of a mixture that is not among the known ones."""
    near = nearest(str(key), known)
    hint = f"did you mean {near!r}? " if near else ""
    return f"unknown key {key!r}: {hint}Keys are {', '.join(known)}"


class FieldMap:
    """Renames fields, joins the parts of turns to text, and makes a system field the first turn.

    `names` maps our name of a field to its name in the records; a `ValueError` says what is wrong with it.
    """

    def __init__(self, names: Mapping[str, Any] | None = None) -> None:
        self.names = dict(names or {})
        for ours, theirs in self.names.items():
            if ours not in NAMES:
                raise ValueError(f"fields has the {unknown_key(ours, NAMES)}")
            texts = theirs if ours == IGNORE and isinstance(theirs, list) else [theirs]
            if not all(isinstance(text, str) and text for text in texts):
                raise ValueError(f"fields: {ours} must be the name of a field in the records, not {theirs!r}")
        ignored = self.names.get(IGNORE, [])
        self._ignored = {ignored} if isinstance(ignored, str) else set(ignored)
        self._of_record = {ours: self.names[ours] for ours in (*OPTIONAL, *NEEDED) if ours in self.names}
        self._speakers = {self.names[ours]: ours for ours in SPEAKERS if ours in self.names}

    def __repr__(self) -> str:
        return repr(sorted(self.names.items()))

    def apply(self, value: Any, where: str) -> Any:
        """Convert the JSON of a record to our layout; anything but an object is returned as it is.

        Raises:
            RecordError: If a field is missing, or cannot be read.
        """
        if not self.names or not isinstance(value, Mapping):
            return value
        left_out = self._ignored | set(self._of_record.values())
        record = {name: content for name, content in value.items() if name not in left_out}
        for ours, theirs in self._of_record.items():
            record.pop(ours, None)
            if value.get(theirs) is not None:
                record[ours] = _with_path(value[theirs]) if ours in _MEDIA else value[theirs]
        record_id = None if record.get("id") is None else str(record["id"])
        for ours in NEEDED:
            if ours in self._of_record and ours not in record:
                raise RecordError.at(
                    where,
                    "bad_field",
                    f'fields: takes "{ours}" from {self._of_record[ours]!r}, which the record lacks; it has '
                    f"{', '.join(map(str, value))}",
                    record_id,
                )
        if isinstance(record.get("conversations"), list):
            try:
                self._read_turns(record)
            except ValueError as error:
                raise RecordError.at(where, "bad_turn", str(error), record_id) from error
        return record

    @contextmanager
    def explains_errors(self) -> Iterator[None]:
        """Add the records' names of the fields that an error message quotes."""
        try:
            yield
        except RecordError as error:
            renamed = [f'"{ours}" is {theirs!r}' for ours, theirs in self.names.items() if f'"{ours}"' in error.detail]
            if not renamed:
                raise
            detail = f"{error.detail} (by fields: {', '.join(renamed)} in the records)"
            raise type(error).at(error.where, error.kind, detail, error.record_id) from error

    def _read_turns(self, record: dict[str, Any]) -> None:
        """Convert the turns to our layout, and move the media that they name to the fields of the record."""
        media: dict[str, list[Any]] = {DEFAULT_IMAGE_TOKEN: [], VIDEO_MARKER: []}
        turns = []
        for number, turn in enumerate(record["conversations"], 1):
            if isinstance(turn, Mapping):
                speaker = turn.get(self.names.get("from", "from"))
                if isinstance(speaker, str):
                    speaker = self._speakers.get(speaker, _SPEAKERS_OF_OTHERS.get(speaker, speaker))
                text = turn.get(self.names.get("value", "value"))
                turn = {"from": speaker, "value": _joined(text, number, media) if isinstance(text, list) else text}
            turns.append(turn)
        if "system" in self._of_record and (system := record.pop("system", None)):
            if turns and isinstance(turns[0], Mapping) and turns[0]["from"] == "system":
                raise ValueError('there is both a system turn and the field "system"; keep one of them')
            turns.insert(0, {"from": "system", "value": system})
        record["conversations"] = turns
        for name, marker in (("image", DEFAULT_IMAGE_TOKEN), ("video", VIDEO_MARKER)):
            if media[marker] and record.get(name):
                raise ValueError(f'{name}s are named both in the turns and in the field "{name}"; keep one of them')
            if media[marker]:
                record[name] = media[marker]


def _joined(parts: list[Any], number: int, media: dict[str, list[Any]]) -> str:
    """The text of a turn that is a list of parts, with markers. The paths of its media are appended to `media`."""
    texts = []
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if isinstance(part, str):
            texts.append(part)
        elif kind in _TEXT_PARTS and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in _MARKERS:
            texts.append(_MARKERS[kind])
            path = _path_of(part)
            if path is not part:  # else it means the next of the record's own images
                media[_MARKERS[kind]].append(path)
        else:
            known = ", ".join((*_TEXT_PARTS, *_MARKERS))
            raise ValueError(f"turn {number} has a part that is not one of {known}: {part!r:.80}; convert or remove it")
    return "".join(texts)


def _with_path(value: Any) -> Any:
    """The path of an object, or of each one in a list; a value without a path is left as it is."""
    return [_path_of(item) for item in value] if isinstance(value, list) else _path_of(value)


def _path_of(value: Any) -> Any:
    while isinstance(value, Mapping) and (found := [value[name] for name in _PATHS if value.get(name) is not None]):
        value = found[0]
    return value
