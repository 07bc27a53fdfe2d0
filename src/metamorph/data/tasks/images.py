"""`text_to_image` and `image_edit`: the answer is an image."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from metamorph.data.media.refs import ImageRef
from metamorph.data.media.video import VideoInfo
from metamorph.data.records import Record, Turn
from metamorph.data.tasks import wording
from metamorph.data.tasks.base import Conversation, Task, check_field_name, fill, pick, without_markers
from metamorph.models.sequence.constants import DEFAULT_IMAGE_TOKEN


SOURCE_FIELDS = ("source", "input", "original_image", "source_img", "input_image", "source_image")
TARGET_FIELDS = ("target", "output", "edited_image", "target_img", "output_image", "target_image")
INSTRUCTION_FIELDS = ("instruction", "edit", "edit_prompt", "edit_instruction")
CAPTION_FIELDS = ("caption", "text", "captions")


@dataclass(frozen=True)
class TextToImageOptions:
    """Options of `text_to_image`."""

    caption_field: str | None = None
    """Field of the caption: a text, or a list of texts of which one is picked. By default the first of `caption`,
    `text` and `captions` that the record has, else the first `gpt` turn."""

    def __post_init__(self) -> None:
        check_field_name("caption_field", self.caption_field)


@dataclass(frozen=True)
class ImageEditOptions:
    """Options of `image_edit`."""

    source_field: str | None = None
    """Field of the path of the image to edit; by default one of the usual (`source`, `input`, `original_image`, …),
    else the first path of `image`."""
    target_field: str | None = None
    """Field of the path of the edited image; by default one of the usual (`target`, `output`, `edited_image`, …),
    else the second path of `image`."""
    instruction_field: str | None = None
    """Field of the instruction: a text, or a list of texts of which one is picked; by default one of the usual
    (`instruction`, `edit`, `edit_prompt`, …), else the first `human` turn."""

    def __post_init__(self) -> None:
        for field in fields(self):
            check_field_name(field.name, getattr(self, field.name))


def _text_to_image(
    record: Record, rng: np.random.Generator, options: TextToImageOptions, video: VideoInfo | None
) -> Conversation:
    if len(record.images) != 1:
        raise record.error(
            "image_count", f'the task text_to_image takes one image, but "image" names {len(record.images)}'
        )
    caption = _text(record, rng, options.caption_field, CAPTION_FIELDS, "assistant", "caption")
    return Conversation(
        turns=(
            Turn("user", fill(pick(rng, wording.DRAW), caption=caption)),
            Turn("assistant", fill(pick(rng, wording.DRAWN), image=DEFAULT_IMAGE_TOKEN)),
        ),
        images=(ImageRef(record.images[0]),),
    )


def _image_edit(
    record: Record, rng: np.random.Generator, options: ImageEditOptions, video: VideoInfo | None
) -> Conversation:
    source = _path(record, options.source_field, SOURCE_FIELDS, 0, "image to edit")
    target = _path(record, options.target_field, TARGET_FIELDS, 1, "edited image")
    instruction = _text(record, rng, options.instruction_field, INSTRUCTION_FIELDS, "user", "instruction")
    return Conversation(
        turns=(
            Turn("user", fill(pick(rng, wording.EDIT), image=DEFAULT_IMAGE_TOKEN, instruction=instruction)),
            Turn("assistant", fill(pick(rng, wording.EDITED), image=DEFAULT_IMAGE_TOKEN)),
        ),
        images=(ImageRef(source), ImageRef(target)),
    )


def _path(record: Record, chosen: str | None, usual: tuple[str, ...], place: int, what: str) -> str:
    """A path from a field, or from its place in `image` if the record has none of the usual fields."""
    name = _field(record, chosen, usual)
    if name is not None:
        value = record.fields.get(name)
        if not isinstance(value, str) or not value:
            raise record.error("bad_field", f'"{name}" must be the path of the {what}, not {value!r:.80}')
        return value
    if place < len(record.images) <= 2:
        return record.images[place]
    raise record.error(
        "bad_field",
        f'there is no path of the {what}; name it in "{usual[0]}", or give "image" as a list of the image to edit and '
        "the edited one",
    )


def _text(
    record: Record, rng: np.random.Generator, chosen: str | None, usual: tuple[str, ...], role: str, what: str
) -> str:
    """A text from a field, or from the first turn of a role if the record has none of the usual fields."""
    name = _field(record, chosen, usual)
    value: Any = None if name is None else record.fields.get(name)
    if name is None:
        name = "conversations"
        value = next((turn.text for turn in record.turns if turn.role == role), None)
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        value = pick(rng, value)
    if not isinstance(value, str) or not without_markers(value):
        raise record.error(
            "bad_field", f'there is no {what}: "{name}" has {value!r:.80}; write it as text in "{usual[0]}"'
        )
    return without_markers(value)


def _field(record: Record, chosen: str | None, usual: tuple[str, ...]) -> str | None:
    """The field that the options name, or the first of the usual ones that the record has."""
    return chosen or next((name for name in usual if record.fields.get(name) is not None), None)


TEXT_TO_IMAGE = Task("text_to_image", TextToImageOptions, _text_to_image, draws=True)
"""A caption and an image: the model is asked to draw the caption."""
IMAGE_EDIT = Task("image_edit", ImageEditOptions, _image_edit, draws=True)
"""An image, an instruction and the edited image."""
