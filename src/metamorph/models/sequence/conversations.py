"""Messages taken apart into text and images, and the sequence that grows from them piece by piece."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from metamorph.models.sequence.chat_templates import ROLES
from metamorph.models.sequence.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_TOKEN,
    IGNORE_INDEX,
)
from metamorph.models.sequence.image_tokens import ImageTokens


_WRAPPED_IMAGE = rf"{DEFAULT_IM_START_TOKEN}\s*{DEFAULT_IMAGE_TOKEN}\s*{DEFAULT_IM_END_TOKEN}"
_IMAGE_MARKER = re.compile(rf"{_WRAPPED_IMAGE}|{DEFAULT_IMAGE_TOKEN}")
"""An image in text. Data may hold the wrapped form already; both mean one image."""


@dataclass
class EncodedConversation:
    """One conversation, ready for the model."""

    input_ids: torch.Tensor
    """int64 `[sequence]`; each image is already expanded to its placeholders."""
    labels: torch.Tensor
    """int64 `[sequence]`, unshifted: the id where text is learnt, `IGNORE_INDEX` elsewhere."""
    visual_target_mask: torch.Tensor
    """bool `[sequence]`: the placeholders of images in assistant turns."""
    pixel_values: torch.Tensor | None
    """float32 `[images, 3, height, width]` in reading order; None without images."""
    num_dropped_images: int = 0
    """Images that were cut off together with their placeholders."""
    truncated: bool = False
    """Whether the conversation was longer than `model_max_length`."""

    @property
    def is_supervised(self) -> bool:
        """Whether there is anything to learn: a text label or a visual target."""
        return bool((self.labels != IGNORE_INDEX).any() or self.visual_target_mask.any())


@dataclass(frozen=True)
class TextPart:
    """Text that the model wrote."""

    text: str


@dataclass(frozen=True, eq=False)
class ImagePart:
    """An image that the model wrote, as visual tokens."""

    visual_tokens: torch.Tensor
    """`[num_image_tokens, vision_hidden]`."""


class ImageMarker:
    """Stands for one image in the parts of a message."""

    def __init__(self, image: Image.Image | None = None) -> None:
        self.image = image


@dataclass
class Message:
    """One message, its content taken apart."""

    role: str
    parts: list[str | ImageMarker]

    @property
    def num_open_images(self) -> int:
        """Markers whose image is not part of the message."""
        return sum(isinstance(part, ImageMarker) and part.image is None for part in self.parts)


@dataclass
class SequenceBuilder:
    """Ids, labels and visual-target mask of one conversation; they grow together or not at all."""

    tokens: ImageTokens
    num_image_tokens: int
    limit: int | None
    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    targets: list[bool] = field(default_factory=list)
    num_images: int = 0
    truncated: bool = False

    def add_text(self, ids: list[int], supervised: bool) -> None:
        """Append text, as much of it as fits."""
        if self.truncated:
            return
        if self.limit is not None and len(self.ids) + len(ids) > self.limit:
            ids = ids[: self.limit - len(self.ids)]
            self.truncated = True
        self._append(ids, ids if supervised else [IGNORE_INDEX] * len(ids), [False] * len(ids))

    def add_image(self, is_answer: bool) -> None:
        """Append a whole image, or cut the conversation before it."""
        start, end = ([] if token is None else [token] for token in (self.tokens.image_start, self.tokens.image_end))
        count = self.num_image_tokens
        length = len(start) + count + len(end)
        if self.truncated or (self.limit is not None and len(self.ids) + length > self.limit):
            self.truncated = True
            return
        around = (start, end) if is_answer else ([IGNORE_INDEX] * len(start), [IGNORE_INDEX] * len(end))
        self._append(
            [*start, *[self.tokens.image] * count, *end],
            [*around[0], *[IGNORE_INDEX] * count, *around[1]],
            [*[False] * len(start), *[is_answer] * count, *[False] * len(end)],
        )
        self.num_images += 1

    def remove(self, count: int) -> None:
        """Take the last ids away; they must be text."""
        for values in (self.ids, self.labels, self.targets):
            del values[len(values) - count :]

    def add(self, ids: list[int], supervised: bool) -> None:
        """Append ids, and a whole image for each placeholder among them."""
        start = 0
        for _ in range(ids.count(self.tokens.image)):
            place = ids.index(self.tokens.image, start)
            self.add_text(ids[start:place], supervised)
            self.add_image(supervised)
            start = place + 1
        self.add_text(ids[start:], supervised)

    def _append(self, ids: list[int], labels: list[int], targets: list[bool]) -> None:
        self.ids += ids
        self.labels += labels
        self.targets += targets


def parse_messages(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Take messages apart; their contents are strings with markers or lists of parts.

    Raises:
        ValueError: For an unknown role or kind of part.
    """
    parsed = []
    for index, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise ValueError(f"message {index} has the role {role!r}; use one of {', '.join(ROLES)}")
        parts = split_at_images(content) if isinstance(content, str) else _parse_parts(index, content)
        parsed.append(Message(role, _stripped(parts)))
    return parsed


def _parse_parts(index: int, content: Any) -> list[str | ImageMarker]:
    if not isinstance(content, list):
        raise ValueError(f"the content of message {index} must be a string or a list, not {type(content).__name__}")
    parts: list[str | ImageMarker] = []
    for part in content:
        if part.get("type") == "text":
            parts.append(part["text"])
        elif part.get("type") == "image":
            parts.append(ImageMarker(part.get("image")))
        else:
            raise ValueError(f"message {index} has a part of type {part.get('type')!r}; use 'text' or 'image'")
    return parts


def with_placeholders(text: str, placeholder: str) -> str:
    """Text with the token `placeholder` in place of each image marker, wrapped or not."""
    return _IMAGE_MARKER.sub(placeholder, text)


def split_at_images(text: str) -> list[str | ImageMarker]:
    """Split text at its image markers, wrapped or not; nothing else of the text is changed."""
    pieces = _IMAGE_MARKER.split(text)
    parts: list[str | ImageMarker] = [pieces[0]]
    for piece in pieces[1:]:
        parts += [ImageMarker(), piece]
    return [part for part in parts if part != ""]


def _stripped(parts: list[str | ImageMarker]) -> list[str | ImageMarker]:
    """Neighbouring texts joined, without white space at the ends of the message."""
    merged: list[str | ImageMarker] = []
    for part in parts:
        if isinstance(part, str) and merged and isinstance(merged[-1], str):
            merged[-1] += part
        else:
            merged.append(part)
    parts = merged
    if parts and isinstance(parts[0], str):
        parts[0] = parts[0].lstrip()
    if parts and isinstance(parts[-1], str):
        parts[-1] = parts[-1].rstrip()
    return [part for part in parts if part != ""]


def assign_images(messages: list[Message], images: Sequence[Image.Image] | None) -> list[Image.Image]:
    """All images in reading order: those inside the messages, and `images` for the other markers."""
    check_image_count(sum(message.num_open_images for message in messages), len(images or ()))
    rest = iter(images or ())
    markers = (part for message in messages for part in message.parts if isinstance(part, ImageMarker))
    return [next(rest) if marker.image is None else marker.image for marker in markers]


def check_image_count(num_markers: int, num_images: int) -> None:
    """Make sure that there is one image for each marker.

    Raises:
        ValueError: If the numbers differ; the message names both.
    """
    if num_markers != num_images:
        raise ValueError(
            f"the text has {num_markers} {DEFAULT_IMAGE_TOKEN} marker(s), but {num_images} image(s) were given; there "
            "must be exactly one marker for each image"
        )


def pad_rows(
    rows: list[list[int]], pad_token_id: int, padding: bool | str, padding_side: str, max_length: int | None
) -> dict[str, Any]:
    """Pad rows of ids; `input_ids` and `attention_mask` as lists, `[batch, sequence]` where padded.

    Args:
        rows: Ids of each row.
        pad_token_id: Id to pad with.
        padding: True or `"longest"`, `"max_length"` (needs `max_length`), or False.
        padding_side: `left` or `right`.
        max_length: Least length with `padding="max_length"`.

    Raises:
        ValueError: If a value is not allowed.
    """
    if padding not in (True, False, "longest", "max_length", "do_not_pad"):
        raise ValueError(f"padding={padding!r} is unknown; use True, 'longest', 'max_length' or False")
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side={padding_side!r} is unknown; use 'left' or 'right'")
    target = max((len(row) for row in rows), default=0)
    if padding == "max_length":
        if max_length is None:
            raise ValueError("padding='max_length' needs max_length")
        target = max(target, max_length)
    input_ids, attention_mask = [], []
    for row in rows:
        fill = target - len(row) if padding not in (False, "do_not_pad") else 0
        pads, ones = [pad_token_id] * fill, [1] * len(row)
        left = padding_side == "left"
        input_ids.append(pads + row if left else row + pads)
        attention_mask.append([0] * fill + ones if left else ones + [0] * fill)
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def split_generated(
    ids: list[int], placeholder: int, num_image_tokens: int, ends: frozenset[int]
) -> list[list[int] | None]:
    """Take an answer apart: ids of text, with None for each complete image between them.

    Args:
        ids: Ids that the model wrote.
        placeholder: Id of the placeholder.
        num_image_tokens: Placeholders of one image.
        ends: Ids that end the answer; what follows the first of them is ignored.
    """
    ids = ids[: next((place for place, token in enumerate(ids) if token in ends), len(ids))]
    runs: list[list[int] | None] = []
    text: list[int] = []
    placeholders = 0
    for token in ids:
        if token != placeholder:
            text.append(token)
            continue
        placeholders += 1
        if placeholders == num_image_tokens:
            runs += [text, None]
            text, placeholders = [], 0
    return [*runs, text]
