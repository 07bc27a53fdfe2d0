"""What a task is: a pure function from a record to a conversation and the pictures that belong into it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from metamorph.data.records import Record, Turn, check_conversation
from metamorph.data.video import VideoInfo
from metamorph.models.constants import DEFAULT_IMAGE_TOKEN


@dataclass(frozen=True)
class Box:
    """A rectangle in an upright image."""

    left: float
    top: float
    right: float
    bottom: float
    relative: bool = False
    """Whether the sides are shares of width and height (0 to 1) instead of pixels."""

    def grown(self, margin: float) -> Box:
        """The box with `margin` times its width and height added on each side."""
        x, y = margin * (self.right - self.left), margin * (self.bottom - self.top)
        return replace(self, left=self.left - x, top=self.top - y, right=self.right + x, bottom=self.bottom + y)

    def pixels(self, width: int, height: int) -> tuple[int, int, int, int] | None:
        """Left, top, right and bottom in whole pixels of an image of that size, as far as they are in it.

        Returns:
            At least one pixel in each direction, or None if the box lies outside the image.
        """
        x, y = (width, height) if self.relative else (1, 1)
        left, top = max(math.floor(self.left * x), 0), max(math.floor(self.top * y), 0)
        right, bottom = min(math.ceil(self.right * x), width), min(math.ceil(self.bottom * y), height)
        return (left, top, right, bottom) if left < right and top < bottom else None


@dataclass(frozen=True)
class ImageRef:
    """A picture that has not been read yet: what it is made from."""

    path: str
    """Path of an image or a video, as written in the record."""
    crop: Box | None = None
    """The part of the image to cut out; None for all of it."""
    boxes: tuple[tuple[str, Box], ...] = ()
    """Names and boxes to draw into the image (before it is cropped)."""
    time: float | None = None
    """Seconds from the first frame, if `path` is a video; None for an image."""


@dataclass(frozen=True)
class Conversation:
    """Turns and their pictures."""

    turns: tuple[Turn, ...]
    """What is said, with one `<image>` marker for each picture."""
    images: tuple[ImageRef, ...]
    """The pictures in reading order."""

    @property
    def num_answer_images(self) -> int:
        """Number of pictures in assistant turns: those that the model learns to draw."""
        return sum(count_markers(turn.text) for turn in self.turns if turn.role == "assistant")


Build = Callable[[Record, np.random.Generator, Any, VideoInfo | None], Conversation]


@dataclass(frozen=True)
class Task:
    """One kind of training data.

    Args:
        name: Name in mixture files.
        options_type: Frozen dataclass of the options, all with defaults; its constructor checks their values.
        build: Makes the conversation; pure, so the same record, generator state, options and video give the same.
        needs_video: Whether records name a video, whose [`VideoInfo`] `build` needs.
    """

    name: str
    options_type: type
    build: Build
    needs_video: bool = False

    def __call__(
        self, record: Record, rng: np.random.Generator, options: Any, video: VideoInfo | None = None
    ) -> Conversation:
        """Make the conversation of a record; no file is opened.

        Args:
            record: The record.
            rng: Draws wordings, templates and frames.
            options: An `options_type`, see [`parse_options`].
            video: What is known of the record's video, for tasks that need one.

        Returns:
            A conversation whose turns alternate and whose markers and pictures agree in number.

        Raises:
            RecordError: If the record does not fit the task.
        """
        conversation = self.build(record, rng, options, video)
        check_conversation(record, conversation.turns, len(conversation.images))
        return conversation


def count_markers(text: str) -> int:
    """Number of images in a text; a wrapped `<image_start><image><image_end>` is one."""
    return text.count(DEFAULT_IMAGE_TOKEN)
