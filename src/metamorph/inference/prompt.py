"""What the model is asked: text or a conversation, its images, and how to answer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from metamorph.data.records import VIDEO_MARKER
from metamorph.inference.sampling import Sampling
from metamorph.models.image_files import load_image
from metamorph.models.sequence.constants import DEFAULT_IMAGE_TOKEN


Images = Image.Image | str | Path | Sequence[Image.Image | str | Path]
"""PIL images or files; one, or several."""
Item = TypeVar("Item")


@dataclass(frozen=True)
class Prompt:
    """What the model answers, and how."""

    text: str | Sequence[Mapping[str, Any]]
    """A user's turn, with an `<image>` marker for each image, or a conversation: messages as in `apply_chat_template`,
    the last one the user's."""
    images: tuple[Any, ...] = ()
    """Images of the markers."""
    draw: bool = False
    """Whether the answer begins with an image, however the model would begin it."""
    allow_images: bool = True
    """False makes the answer text only."""
    sampling: Sampling | None = None
    """How text is chosen; None is greedy, unless `reply_to` has arguments for `generate`."""
    max_new_tokens: int | None = None
    """Limit of this answer; None is that of the call."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer."""

    @property
    def messages(self) -> Sequence[Mapping[str, Any]]:
        """The conversation."""
        return [{"role": "user", "content": self.text}] if isinstance(self.text, str) else self.text


def open_images(images: Images) -> tuple[Image.Image, ...]:
    """The images, read if they are files."""
    if isinstance(images, (Image.Image, str, Path)):
        images = [images]
    return tuple(load_image(image) if isinstance(image, (str, Path)) else image for image in images)


def place_media(
    prompt: str, images: Sequence[Item], videos: Sequence[Sequence[Item]] = ()
) -> tuple[str, tuple[Item, ...]]:
    """The prompt with an `<image>` marker for each image and frame, and these in the order of the markers.

    A prompt may mark where images (`<image>`) and videos (`<video>`) belong; those without markers come first. Another
    number of markers is a `ValueError`.
    """
    for marker, count, kind in ((VIDEO_MARKER, len(videos), "video"), (DEFAULT_IMAGE_TOKEN, len(images), "image")):
        if marker not in prompt:
            prompt = f"{marker}\n" * count + prompt
        if (found := prompt.count(marker)) != count:
            raise ValueError(f"the prompt has {found} {marker} markers, but there are {count} {kind}(s)")
    rest_of_images, rest_of_videos = iter(images), iter(videos)
    text, ordered = "", []
    for piece in re.split(f"({VIDEO_MARKER}|{DEFAULT_IMAGE_TOKEN})", prompt):
        if piece == DEFAULT_IMAGE_TOKEN:
            ordered.append(next(rest_of_images))
        elif piece == VIDEO_MARKER:
            frames = next(rest_of_videos)
            ordered += frames
            piece = DEFAULT_IMAGE_TOKEN * len(frames)
        text += piece
    return text, tuple(ordered)
