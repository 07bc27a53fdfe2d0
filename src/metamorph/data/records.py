"""Records: parsed into typed values, with errors that name the place, the record and the fix."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from metamorph.flags.checks import printable
from metamorph.models.sequence.constants import DEFAULT_IMAGE_TOKEN


ROLE_OF_SPEAKER = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
"""The allowed values of `"from"`, and their roles."""

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
"""Some programs write it before UTF-8 text."""

MAX_RECORD_BYTES = 32 * 2**20
"""Longest text of a record: parsed, it takes up to twenty times as much memory. A longer one lacks an end of line or a
quotation mark, or has content that belongs in files."""

MAX_NAME, MAX_DETAIL, MAX_MESSAGE = 200, 1000, 4000
"""Maximum characters of a place or id, of a detail, and of a message, which may repeat the data."""

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".wmv", ".flv", ".ts", ".3gp")

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".jp2", ".jpx", ".j2k", ".avif"),
    *(".heic", ".heif", ".jxl", ".svg", ".ico", ".tga"),
)
"""Those of the last line are recognised, and refused when the file is opened."""

VIDEO_MARKER = "<video>"
"""Marks the place of the video in the text, for the task `video_qa`."""

_MAPPING = "fields: {{{turns}from: role, value: content}}"
"""How to read a source whose turns have other names, for error messages."""

_NEEDS_TURNS = 'the record needs "conversations": a list of {"from": "human" or "gpt", "value": text}'

ON_BAD_RECORD = ("raise", "skip")
"""The values of `--on_bad_record`."""

BAD_RECORD_KINDS = {
    "broken_line": "the text of the record is not JSON, or not UTF-8, or contains half a character",
    "not_an_object": "the record is not a JSON object",
    "no_conversations": "there are no turns",
    "bad_turn": 'a turn is not {"from": ..., "value": text}',
    "unknown_speaker": '"from" has a value that is not allowed',
    "bad_image_field": '"image" is neither a path nor a list of paths',
    "bad_video_field": '"video" is not one path, or the record has images as well',
    "bad_field": "a field that the task reads is missing or wrong",
    "bad_box": "a box is not four numbers that enclose an area",
    "box_units": "the numbers of a box are not in the unit of box_units",
    "unread_media": "no image or video is read, but a field that is not read looks like one",
    "role_order": "turns do not alternate, or the template cannot express their order",
    "image_count": "the numbers of markers and images differ",
    "outside_folder": "a relative path leaves the image folder",
    "missing_image": "there is no such image file",
    "unreadable_image": "the file is not an image, or is broken",
    "image_too_large": "the image has more pixels than the limit",
    "missing_features": "the feature cache has no visual tokens of the image",
    "missing_video": "there is no such video file, or the task needs one and the record names none",
    "unreadable_video": "the file is not a video, or is broken",
    "too_few_frames": "the video is too short for the task",
    "no_answer_image": "the task trains drawing, but no answer has an image",
    "unsupervised": "the record has nothing to learn, or nothing is left of it after truncation",
    "other": "any other kind",
}
"""Kinds of bad records, by which they are counted."""


class RecordError(ValueError):
    """A record that cannot be used; created with [`RecordError.at`].

    The message alone suffices, because that is how a data loader re-creates the errors of its workers.
    """

    kind: str = "other"
    """One of `BAD_RECORD_KINDS`."""
    where: str = ""
    """File and line (or index) of the record."""
    record_id: str | None = None
    detail: str = ""
    """The message without place and id."""

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(message).replace("\n", "\\n"))

    @classmethod
    def at(cls, where: str, kind: str, detail: str, record_id: str | None = None) -> RecordError:
        """The error of the record at `where`; `detail` says what is wrong and how to fix it."""
        where, detail = _shortened(printable(where)), _shortened(detail, MAX_DETAIL)
        record_id = None if record_id is None else _shortened(str(record_id))
        error = cls(f"{where if record_id is None else f'{where} (id {record_id!r})'}: {detail}")
        error.kind, error.where, error.record_id, error.detail = kind, where, record_id, str(cls(detail))
        return error


class UnsupervisedRecordError(RecordError):
    """A record with nothing to learn: no text label and no visual target."""


class DataError(ValueError):
    """A data source that cannot be used at all."""

    def __init__(self, message: str = "") -> None:
        super().__init__(_shortened(printable(message), MAX_MESSAGE))


def _shortened(text: str, limit: int = MAX_NAME) -> str:
    """The beginning and the end of a text longer than `limit`: messages end with what to do."""
    if len(text) <= limit:
        return text
    half = (limit - 1) // 2
    return f"{text[:half]}…{text[-half:]}"


@dataclass(frozen=True)
class RawRecord:
    """A record as JSON, and its place."""

    where: str
    """File and line (or index)."""
    value: Any


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation."""

    role: str
    """`system`, `user` or `assistant`."""
    text: str
    """With a marker for each image."""

    def as_message(self) -> dict[str, str]:
        """The turn as the processor expects it."""
        return {"role": self.role, "content": self.text}


@dataclass(frozen=True)
class Record:
    """A parsed record, which its task turns into a conversation."""

    id: str
    """The record's own id, or its place in the file."""
    where: str
    """File and line (or index), for error messages."""
    images: tuple[str, ...] = ()
    """Paths as written in the record, in the order of the markers."""
    video: str | None = None
    """Path of the video as written in the record."""
    turns: tuple[Turn, ...] = ()
    """The conversation; empty if the record has none, such as a caption."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """The entire JSON object, for tasks that read other fields than LLaVA's."""

    def error(self, kind: str, detail: str) -> RecordError:
        """An error of this record, see [`RecordError.at`]."""
        return RecordError.at(self.where, kind, detail, self.id)


def check_length(num_bytes: int, where: str) -> None:
    """Refuse a record that is too long, before it is read."""
    if num_bytes > MAX_RECORD_BYTES:
        raise RecordError.at(
            where,
            "broken_line",
            f"the record has {num_bytes} bytes, more than {MAX_RECORD_BYTES}; is the end of a line or a quotation mark "
            "missing? Long content belongs in separate files",
        )


def parse_json(text: bytes, where: str) -> Any:
    """Parse the text of one record, which must be JSON in UTF-8."""
    try:
        return json.loads(text.removeprefix(BYTE_ORDER_MARK))
    except json.JSONDecodeError as error:
        column = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        message = error.msg.removesuffix(" at")
        fault = f"the text is not valid JSON ({message} at {column}: {text[:60]!r}); correct or remove it"
        raise RecordError.at(where, "broken_line", fault) from error
    except UnicodeDecodeError as error:
        fault = f"the text is not UTF-8 ({error.reason} at byte {error.start}); convert it to UTF-8"
        raise RecordError.at(where, "broken_line", fault) from error
    except ValueError as error:  # a number with thousands of digits
        fault = f"the text cannot be read ({error}); correct or remove it"
        raise RecordError.at(where, "broken_line", fault) from error
    except RecursionError as error:
        raise RecordError.at(where, "broken_line", "the text is nested too deeply; correct or remove it") from error


def parse_record(value: Any, where: str) -> Record:
    """Check the fields of a record that all tasks share.

    They are `{"id", "image": absent | path | list of paths, "video": absent | path, "conversations": absent |
    [{"from", "value"}, ...]}`; `"image"` may also name a video. Whether turns and images match is checked once the task
    has built a conversation: see [`check_conversation`].

    Raises:
        RecordError: If one of these fields is wrong.
    """
    if not isinstance(value, Mapping):
        raise RecordError.at(where, "not_an_object", f"a record must be a JSON object, not {type(value).__name__}")
    record = Record(str(value["id"]) if value.get("id") is not None else where, where, fields=value)
    images, video = _parse_media(record)
    return replace(record, images=images, video=video, turns=_parse_turns(record))


def check_conversation(record: Record, turns: Sequence[Turn], num_images: int) -> None:
    """Check that turns alternate, that their text can be encoded, and that there is one image for each marker.

    Raises:
        RecordError: Of kind `no_conversations`, `role_order`, `image_count` or `broken_line`.
    """
    if not turns:
        raise record.error("no_conversations", f"{_NEEDS_TURNS}. {_other_turns(record.fields)}")
    _check_order(record, turns)
    for number, turn in enumerate(turns, 1):
        try:
            turn.text.encode()
        except UnicodeEncodeError as error:  # half of an emoji, say: JSON can express it, but no tokenizer accepts it
            raise record.error(
                "broken_line",
                f"turn {number} has {turn.text[error.start]!r} at character {error.start}, half a character that "
                "cannot be written as UTF-8; remove or complete it",
            ) from None
    markers = sum(turn.text.count(DEFAULT_IMAGE_TOKEN) for turn in turns)
    if markers != num_images:
        raise record.error(
            "image_count",
            f"the turns have {markers} {DEFAULT_IMAGE_TOKEN} marker(s), but the record names {num_images} image(s); "
            "write exactly one marker where each image belongs",
        )


def _other_turns(fields: Mapping[str, Any]) -> str:
    """How to fix a record without conversations, which may have another name."""
    for name, value in fields.items():
        first = value[0] if isinstance(value, list) and value else None
        if isinstance(first, Mapping) and {"role", "from", "speaker"} & first.keys():
            return f"If these are in {name!r}, say so in a mixture: {_MAPPING.format(turns=f'conversations: {name}, ')}"
    return "If it is of another kind, such as a caption, declare its task in a mixture"


def is_video(path: str) -> bool:
    """Whether a path ends with one of `VIDEO_SUFFIXES`, in any case."""
    return path.lower().endswith(VIDEO_SUFFIXES)


def _parse_media(record: Record) -> tuple[tuple[str, ...], str | None]:
    """Paths of the images, and of the video, which either field may name."""
    paths = _parse_paths(record, "image", "a path or a list of paths")
    videos = _parse_paths(record, "video", "a path") + [path for path in paths if is_video(path)]
    images = [path for path in paths if not is_video(path)]
    if len(videos) > 1:
        fault = f"a record has at most one video, not {len(videos)}; make a record of each"
    elif videos and images:
        fault = f"a record has either a video or images, not both {videos[0]!r} and {images[0]!r}"
    else:
        return tuple(images), videos[0] if videos else None
    raise record.error("bad_video_field", fault)


def _parse_paths(record: Record, name: str, demand: str) -> list[str]:
    value = record.fields.get(name)
    paths = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
        raise record.error(f"bad_{name}_field", f'"{name}" must be {demand}, not {value!r:.80}')
    return paths


def _parse_turns(record: Record) -> tuple[Turn, ...]:
    value = record.fields.get("conversations")
    if value is None:
        return ()
    if not isinstance(value, list) or not value:
        raise record.error("no_conversations", f"{_NEEDS_TURNS}, not {value!r:.80}")
    turns = []
    for number, turn in enumerate(value, 1):
        if not isinstance(turn, Mapping):
            raise record.error("bad_turn", f"turn {number} must be a JSON object, not {type(turn).__name__}")
        speaker, text = turn.get("from"), turn.get("value")
        if not isinstance(speaker, str) or speaker not in ROLE_OF_SPEAKER:
            detail = f'turn {number} has "from": {speaker!r}; use one of {", ".join(ROLE_OF_SPEAKER)}'
            if speaker is None:
                detail += f", or name the field of the turns in a mixture: {_MAPPING.format(turns='')}"
            raise record.error("unknown_speaker", detail)
        if not isinstance(text, str):
            raise record.error("bad_turn", f'turn {number} has "value": {text!r:.80}; it must be a string')
        turns.append(Turn(ROLE_OF_SPEAKER[speaker], text))
    return tuple(turns)


def _check_order(record: Record, turns: Sequence[Turn]) -> None:
    """A system turn may come first; then human and gpt alternate, human first."""
    expected = "user"
    for number, turn in enumerate(turns, 1):
        if turn.role == "system" and number == 1:
            continue
        if turn.role != expected:
            raise record.error(
                "role_order",
                f"turn {number} is spoken by the {turn.role} where the {expected} is expected; a conversation is: "
                "system (optional), then human and gpt alternating; join or remove turns",
            )
        expected = "assistant" if expected == "user" else "user"
