"""Warnings about records: media fields that are not read, and questions without an answer."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from metamorph.data.records import IMAGE_SUFFIXES, VIDEO_SUFFIXES, Record, RecordError, Turn


REMARKS = {
    "unread_field": "a field that looks like media or a system prompt is not read",
    "unread_marker": "a marker of a video or of audio that is not read is plain text",
    "no_answer": "the last human turn has no answer, so nothing is learned from it",
}
"""Kinds of remarks. Training accepts these records."""

VIDEO_NAMES = frozenset(("videos", "video_path", "video_paths", "video_file", "video_url"))
AUDIO_NAMES = frozenset(("audio", "audios", "audio_path"))
MEDIA_NAMES = VIDEO_NAMES | AUDIO_NAMES
MEDIA_NAMES |= {"images", "image_path", "image_paths", "image_file", "image_files", "image_name", "image_url"}
MEDIA_NAMES |= {"image_urls", "img", "imgs", "img_path", "img_paths", "picture", "pictures", "photo", "photos"}
"""Media fields of other layouts; any other field with the name of an image or video file counts as well."""
SYSTEM_NAMES = ("system", "system_prompt", "system_message")
"""Fields of the system turn in other layouts."""

_READ = ("image", "video", "conversations")
_MARKER = re.compile(r"^\s*<(video|audio)>|<(video|audio)>\s*$")
"""At the beginning or end of a turn; in between, it may be HTML that the text is about."""


def unread_media(record: Record, paths: Collection[str] = ()) -> Iterator[tuple[str, Any]]:
    """Name and value of each field that looks like media, but is not among the `paths` that are read."""
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
    """Refuse a record that has media, none of which is read; `cause` is the task's own error, if any.

    Raises:
        RecordError: Of kind `unread_media`.
    """
    for name, value in () if record.images or record.video else unread_media(record):
        raise record.error(
            "unread_media",
            f'"{name}": {value!r:.60} looks like media, but is not read, and no other image or video is; '
            f"{_fix(name, value)}",
        ) from cause


def _fix(name: str, value: Any) -> str:
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
    """Kind and detail of anything that is not read (`paths` are), or that nothing is learned from."""
    for name, value in unread_media(record, paths):
        yield "unread_field", f'"{name}": {value!r:.60} looks like media, but is not read; {_fix(name, value)}'
    for name in SYSTEM_NAMES:
        if isinstance(value := record.fields.get(name), str) and value.strip():
            yield (
                "unread_field",
                f'"{name}": {value!r:.60} looks like a system prompt, but is not read; declare the source in a '
                f"mixture with fields: {{system: {name}}}, or leave it out on purpose with fields: "
                f"{{ignore: [{name}]}}",
            )
    for number, turn in enumerate(turns, 1):
        if found := _MARKER.search(turn.text):
            yield (
                "unread_marker",
                f"turn {number} has {found[0].strip()}, which is plain text to the task; remove it, or declare the "
                "source with task: video_qa if it marks a video",
            )
    roles = [turn.role for turn in turns]
    if "assistant" in roles and roles[-1] == "user":
        detail = f"turn {len(turns)} (user) has no answer, so nothing is learned from it; remove it or add the answer"
        yield "no_answer", detail


def _name_of(value: Any) -> str:
    """The file name in a path or an object with a path; empty if there is none."""
    if isinstance(value, Mapping):
        value = next((value[name] for name in ("path", "url", "file_name") if isinstance(value.get(name), str)), "")
    return value.rpartition("/")[2] if isinstance(value, str) else ""


def _is_file(name: str) -> bool:
    """Whether a text is the name of an image or a video, and not a sentence that ends with one."""
    return name.lower().endswith((*IMAGE_SUFFIXES, *VIDEO_SUFFIXES)) and not re.search(r"\s", name)
