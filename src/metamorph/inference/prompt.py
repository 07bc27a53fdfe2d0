"""What the model is asked: text or a conversation, its images, and how to answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from metamorph.inference.sampling import Sampling
from metamorph.models.image_files import load_image
from metamorph.models.sequence.constants import DEFAULT_IMAGE_TOKEN


Images = Image.Image | str | Path | Sequence[Image.Image | str | Path]
"""PIL images or files; one, or several."""


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


def place_images(prompt: str, num_images: int) -> str:
    """The prompt with an `<image>` marker for each image: in front, unless it has the right number of them."""
    markers = prompt.count(DEFAULT_IMAGE_TOKEN)
    if markers == 0:
        return f"{DEFAULT_IMAGE_TOKEN}\n" * num_images + prompt
    if markers != num_images:
        raise ValueError(f"the prompt has {markers} {DEFAULT_IMAGE_TOKEN}, but there are {num_images} image(s)")
    return prompt
