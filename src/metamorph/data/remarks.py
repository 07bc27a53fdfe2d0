"""What a record holds that is not read or teaches nothing: media under other names, questions without an answer."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from metamorph.data.records import IMAGE_SUFFIXES, VIDEO_SUFFIXES, Record, RecordError, Turn


REMARKS = {
    "unread_field": "a field that looks like media or a system prompt is not read",
    "unread_marker": "a marker of a video or of audio that is not read is plain text",
    "no_answer": "the last human turn has no answer, so nothing is learnt from it",
}
"""Kinds of remarks: training accepts the record."""

VIDEO_NAMES = frozenset(("videos", "video_path", "video_paths", "video_file", "video_url"))
AUDIO_NAMES = frozenset(("audio", "audios", "audio_path"))
MEDIA_NAMES = VIDEO_NAMES | AUDIO_NAMES
MEDIA_NAMES |= {"images", "image_path", "image_paths", "image_file", "image_files", "image_name", "image_url"}
MEDIA_NAMES |= {"image_urls", "img", "imgs", "img_path", "img_paths", "picture", "pictures", "photo", "photos"}
"""Fields in which other layouts keep media; whatever else holds the name of an image or video counts as well."""
SYSTEM_NAMES = ("system", "system_prompt", "system_message")
"""Fields in which other layouts keep the system turn."""

_READ = ("image", "video", "conversations")
_MARKER = re.compile(r"^\s*<(video|audio)>|<(video|audio)>\s*$")
"""At the begin or end of a turn; in between, it may be HTML that the text is about."""


def unread_media(record: Record, paths: Collection[str] = ()) -> Iterator[tuple[str, Any]]:
    """Name and value of each field that looks like media and is not among what is read.

    Args:
        record: The record.
        paths: What is read of it.
    """
    read = {path.rpartition("/")[2] for path in (*paths, *record.images, record.video) if path}
    for name, value in record.fields.items():
        if name in _READ or name.endswith(("id", "key")):
            continue
        items = [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, (str, Mapping))]
        found = {_name_of(item) for item in items if item}
        if not found or found <= read:
            continue
        if all("://" in str(item) for item in items) and (read or name not in MEDIA_NAMES):
            continue  # where a file came from
        if name in MEDIA_NAMES or any(_is_file(item) for item in found):
            yield name, value


def refuse_unread(record: Record, cause: RecordError | None = None) -> None:
    """Refuse a record of whose media none is read.

    Args:
        record: The record; one with images or a video is not refused.
        cause: What the task said of it, if it has found fault.

    Raises:
        RecordError: Of kind `unread_media`.
    """
    for name, value in () if record.images or record.video else unread_media(record):
        raise record.error(
            "unread_media",
            f'"{name}": {_short(value)} looks like media, but is not read, and no other image or video is; '
            f"{mend(name, value)}",
        ) from cause


def mend(name: str, value: Any) -> str:
    """How a field that is not read can be read.

    Args:
        name: Its name.
        value: What it holds.
    """
    if name in AUDIO_NAMES:
        return f"audio is not supported: leave it out on purpose with fields: {{ignore: [{name}]}} in a mixture"
    first = value[0] if isinstance(value, list) and value else value
    is_video = name in VIDEO_NAMES or _name_of(first).lower().endswith(VIDEO_SUFFIXES)
    ours = "video" if is_video else "image"
    return (
        f"declare the source in a mixture with fields: {{{ours}: {name}}}, or leave it out on purpose with "
        f"fields: {{ignore: [{name}]}}"
    )


def remarks(record: Record, turns: Sequence[Turn], paths: Collection[str]) -> Iterator[tuple[str, str]]:
    """Kind and detail of what a record holds that is not read, or that nothing is learnt from.

    Args:
        record: The record.
        turns: The conversation that its task made of it.
        paths: Its media that are read.
    """
    for name, value in unread_media(record, paths):
        yield "unread_field", f'"{name}": {_short(value)} looks like media, but is not read; {mend(name, value)}'
    for name in SYSTEM_NAMES:
        if isinstance(value := record.fields.get(name), str) and value.strip():
            yield (
                "unread_field",
                f'"{name}": {_short(value)} looks like a system prompt, but is not read; declare the source in a '
                f"mixture with fields: {{system: {name}}}, or leave it out on purpose with fields: "
                f"{{ignore: [{name}]}}",
            )
    for number, turn in enumerate(turns, 1):
        if found := _MARKER.search(turn.text):
            yield (
                "unread_marker",
                f"turn {number} has {found[0].strip()}, which is plain text to the task; remove it, or declare the "
                "source with task: video_qa if it stands for a video",
            )
    roles = [turn.role for turn in turns]
    if "assistant" in roles and roles[-1] == "user":
        detail = f"turn {len(turns)} (user) has no answer, so nothing is learnt from it; remove it or add the answer"
        yield "no_answer", detail


def _name_of(value: Any) -> str:
    """The name of a file that a value may stand for, without its folder; empty if it names none."""
    if isinstance(value, Mapping):
        value = next((value[name] for name in ("path", "url", "file_name") if isinstance(value.get(name), str)), "")
    return value.rpartition("/")[2] if isinstance(value, str) else ""


def _is_file(name: str) -> bool:
    """Whether a text is the name of an image or a video, and no sentence that ends with one."""
    return name.lower().endswith((*IMAGE_SUFFIXES, *VIDEO_SUFFIXES)) and not re.search(r"\s", name)


def _short(value: Any) -> str:
    return f"{value!r:.60}"
