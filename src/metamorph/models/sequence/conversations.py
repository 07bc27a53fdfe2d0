"""Messages parsed into text and images, the sequence that is built from them, and answers split into both again."""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, groupby, takewhile
from typing import Any

import numpy as np
import torch
from PIL import Image

from metamorph.models.sequence.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_TOKEN,
    IGNORE_INDEX,
    ROLES,
)
from metamorph.models.sequence.image_tokens import ImageTokens


_WRAPPED_IMAGE = rf"{DEFAULT_IM_START_TOKEN}\s*{DEFAULT_IMAGE_TOKEN}\s*{DEFAULT_IM_END_TOKEN}"
IMAGE_MARKER = re.compile(rf"{_WRAPPED_IMAGE}|{DEFAULT_IMAGE_TOKEN}")
"""One image in text. Data may hold the wrapped form already."""
IMAGE_KEYS = ("image", "path", "url", "base64")
"""Keys under which a part of a message may hold its image, as in Transformers."""


@dataclass
class EncodedConversation:
    """One conversation, ready for the model."""

    input_ids: torch.Tensor
    """int64 `[sequence]`, each image expanded to its placeholders."""
    labels: torch.Tensor
    """int64 `[sequence]`, not shifted: the id where text is learned, `IGNORE_INDEX` elsewhere."""
    visual_target_mask: torch.Tensor
    """bool `[sequence]`: the placeholders of images in assistant turns."""
    pixel_values: torch.Tensor | None = None
    """float32 `[images, 3, height, width]` in reading order; None without images."""
    visual_tokens: torch.Tensor | None = None
    """`[images, num_image_tokens, vision_hidden]` of images that were given as visual tokens."""
    visual_tokens_index: torch.Tensor | None = None
    """int64 positions of `visual_tokens` among all images, if there are pixels too."""
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
    images: tuple[Image.Image, ...] = field(default=(), repr=False)
    """Its pixels, once a visualizer has drawn them: each drawing at each guidance scale."""


_SINGLE_IMAGES = (Image.Image, ImagePart, str, bytes, os.PathLike, Mapping)
"""Types of one image, some of which are iterable."""


@dataclass(eq=False)
class ImageMarker:
    """Stands for one image in the parts of a message; `image` is None if it is passed separately."""

    image: Any = None


@dataclass
class Message:
    """One message, its content parsed."""

    role: str
    parts: list[str | ImageMarker]

    @property
    def num_open_images(self) -> int:
        """Number of markers whose image is not part of the message."""
        return sum(isinstance(part, ImageMarker) and part.image is None for part in self.parts)


@dataclass
class SequenceBuilder:
    """Ids, labels and visual-target mask of one conversation, built together."""

    tokens: ImageTokens
    num_image_tokens: int
    limit: int | None
    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    targets: list[bool] = field(default_factory=list)
    num_images: int = 0
    truncated: bool = False

    @property
    def learned(self) -> list[int]:
        """1 for each token of an answer, text or visual, else 0."""
        pairs = zip(self.labels, self.targets, strict=True)
        return [int(is_target or label != IGNORE_INDEX) for label, is_target in pairs]

    def add(self, ids: list[int], supervised: bool) -> None:
        """Append text as far as it fits, and an entire image for each placeholder, or cut the sequence before it."""
        placeholder = self.tokens.image
        wrapped = [self.tokens.image_start, *[placeholder] * self.num_image_tokens, self.tokens.image_end]
        image = [token for token in wrapped if token is not None]
        for is_image, run in groupby(ids, lambda token: token == placeholder):
            for piece in [image] * len(list(run)) if is_image else [list(run)]:
                if self.truncated:
                    return
                if self.limit is not None and len(self.ids) + len(piece) > self.limit:
                    self.truncated = True
                    piece = [] if is_image else piece[: self.limit - len(self.ids)]
                self.ids += piece
                self.labels += [token if supervised and token != placeholder else IGNORE_INDEX for token in piece]
                self.targets += [supervised and token == placeholder for token in piece]
                self.num_images += is_image and not self.truncated

    def remove(self, count: int) -> None:
        """Remove the last ids, which must be text."""
        for values in (self.ids, self.labels, self.targets):
            del values[len(values) - count :]


def parse_messages(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Parse messages, whose contents are strings with markers or lists of parts.

    A part is a dict `{"type": "text", "text": …}` or `{"type": "image", …}`, with the image under one of `IMAGE_KEYS`
    or passed separately; OpenAI's `{"type": "image_url", …}`; or a [`TextPart`] or [`ImagePart`] of an earlier answer.
    """
    parsed = []
    for index, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise ValueError(f"message {index} has the role {role!r}; use one of {', '.join(ROLES)}")
        if isinstance(content, str):
            parts = split_at_images(content)
        elif isinstance(content, (list, tuple)):
            parts = [_parse_part(index, part) for part in content]
        else:
            raise ValueError(f"the content of message {index} must be a string or a list, not {type(content).__name__}")
        parsed.append(Message(role, _stripped(parts)))
    return parsed


def _parse_part(index: int, part: Any) -> str | ImageMarker:
    if isinstance(part, TextPart):
        return part.text
    if isinstance(part, ImagePart):
        return ImageMarker(part)
    if not isinstance(part, Mapping):
        raise ValueError(f"message {index} has a part of the class {type(part).__name__}; use a dict with a 'type'")
    kind = part.get("type")
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise ValueError(f"message {index} has a part of type 'text' without a string as its 'text'")
        return part["text"]
    if kind == "image":
        given = {key: part[key] for key in IMAGE_KEYS if part.get(key) is not None}
        if len(given) > 1:
            raise ValueError(f"message {index} has a part with several images; use one of {', '.join(IMAGE_KEYS)}")
        if isinstance(code := given.get("base64"), str) and not code.startswith("data:"):
            given["base64"] = f"data:;base64,{code}"  # or a file of that name would be read
        return ImageMarker(next(iter(given.values()), None))
    if kind == "image_url":
        address = part.get("image_url")
        address = address.get("url") if isinstance(address, Mapping) else address
        if not isinstance(address, str):
            raise ValueError(f"message {index} has a part of type 'image_url' without a URL")
        return ImageMarker(address)
    raise ValueError(f"message {index} has a part of type {kind!r}; use 'text' or 'image'")


def split_at_images(text: str) -> list[str | ImageMarker]:
    """Split text at its image markers, wrapped or not; the rest of the text is unchanged."""
    pieces = IMAGE_MARKER.split(text)
    parts: list[str | ImageMarker] = [pieces[0]]
    for piece in pieces[1:]:
        parts += [ImageMarker(), piece]
    return [part for part in parts if part != ""]


def _stripped(parts: list[str | ImageMarker]) -> list[str | ImageMarker]:
    """Join neighbouring texts, and strip white space at both ends of the message."""
    merged: list[str | ImageMarker] = [""]
    for part in parts:
        if isinstance(part, str) and isinstance(merged[-1], str):
            merged[-1] += part
        else:
            merged.append(part)
    for end, strip in ((0, str.lstrip), (-1, str.rstrip)):
        if isinstance(text := merged[end], str):
            merged[end] = strip(text)
    return [part for part in merged if part != ""]


def assign_images(messages: Sequence[Message], images: Sequence[Any] | None) -> list[Any]:
    """All images in reading order: those inside the messages, and `images` for the other markers."""
    _check_image_count(sum(message.num_open_images for message in messages), len(images or ()))
    rest = iter(images or ())
    markers = (part for message in messages for part in message.parts if isinstance(part, ImageMarker))
    return [next(rest) if marker.image is None else marker.image for marker in markers]


def divide_images(images: Any, counts: Sequence[int], what: str) -> list[list[Any]]:
    """Divide images among prompts or conversations (`what`), which have `counts` markers each.

    `images` are all images in reading order, or a list of images for each prompt.
    """
    if isinstance(images, (list, tuple)) and images and all(isinstance(own, (list, tuple)) for own in images):
        if len(images) != len(counts):
            raise ValueError(f"there are {len(counts)} {what}s, but {len(images)} lists of images")
        rows = [flatten_images(own) for own in images]
        for number, (row, count) in enumerate(zip(rows, counts, strict=True)):
            _check_image_count(count, len(row), f"{what} {number}" if len(rows) > 1 else "the text")
        return rows
    rest = flatten_images(images)
    _check_image_count(sum(counts), len(rest))
    ends = list(accumulate(counts))
    return [rest[end - count : end] for end, count in zip(ends, counts, strict=True)]


def flatten_images(images: Any) -> list[Any]:
    """Flatten nested lists or other iterables of images (also [`ImagePart`]), in reading order; None has none.

    An array or tensor of four dimensions is a batch of images.
    """
    if images is None:
        return []
    if isinstance(images, (np.ndarray, torch.Tensor)):
        return list(images) if images.ndim == 4 else [images]
    if isinstance(images, _SINGLE_IMAGES) or not isinstance(images, Iterable):
        return [images]
    return [image for item in images for image in flatten_images(item)]


def _check_image_count(num_markers: int, num_images: int, where: str = "the text") -> None:
    if num_markers != num_images:
        raise ValueError(
            f"{where} has {num_markers} {DEFAULT_IMAGE_TOKEN} marker(s), but {num_images} image(s) were given; there "
            "must be exactly one marker for each image"
        )


def interleave(
    answers: Sequence[Any],
    visual_tokens: torch.Tensor | None,
    decode: Callable[[list[int]], str],
    *,
    ends: frozenset[int],
    placeholder: int,
    num_image_tokens: int,
) -> list[list[TextPart | ImagePart]]:
    """Split generated answers, without prompts, into texts and images; `ends` are ids that end an answer."""
    features = [] if visual_tokens is None else list(visual_tokens)
    rows: list[list[TextPart | ImagePart]] = []
    used = 0
    for answer in answers:
        ids = answer.tolist() if isinstance(answer, torch.Tensor) else answer
        parts: list[TextPart | ImagePart] = []
        for run in _split_at_images(takewhile(lambda token: token not in ends, ids), placeholder, num_image_tokens):
            if run is None:
                if used < len(features):
                    parts.append(ImagePart(features[used]))
                used += 1
            elif text := decode(run):
                parts.append(TextPart(text))
        rows.append(parts)
    if used != len(features):
        raise ValueError(
            f"the sequences hold {used} generated image(s) of {num_image_tokens} placeholders, but visual_tokens has "
            f"{len(features)}; is prompt_length the length of the prompt?"
        )
    return rows


def _split_at_images(ids: Iterable[int], placeholder: int, num_image_tokens: int) -> Iterator[list[int] | None]:
    """Ids of text, with None for each complete image between them."""
    text: list[int] = []
    placeholders = 0
    for token in ids:
        if token != placeholder:
            text.append(token)
            continue
        placeholders += 1
        if placeholders == num_image_tokens:
            yield text
            yield None
            text, placeholders = [], 0
    yield text


def stack_visual_tokens(images: Sequence[ImagePart], num_image_tokens: int) -> torch.Tensor:
    """Stack earlier generated images to `[images, num_image_tokens, vision_hidden]`."""
    shapes = {tuple(image.visual_tokens.shape) for image in images}
    if len(shapes) > 1 or any(len(shape) != 2 or shape[0] != num_image_tokens for shape in shapes):
        raise ValueError(
            f"an ImagePart must have visual tokens of shape [{num_image_tokens}, vision_hidden], as this model writes "
            f"them; there are {sorted(shapes)}"
        )
    return torch.stack([image.visual_tokens for image in images])
