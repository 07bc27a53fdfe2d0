"""A task: a pure function from a record to a conversation and its images."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from metamorph.data.media.refs import ImageRef
from metamorph.data.media.video import VideoInfo
from metamorph.data.records import Record, RecordError, Turn, check_conversation
from metamorph.data.remarks import refuse_unread
from metamorph.models.sequence.constants import DEFAULT_IMAGE_TOKEN
from metamorph.models.sequence.conversations import split_at_images


Chosen = TypeVar("Chosen")


@dataclass(frozen=True)
class Conversation:
    """Turns and their images."""

    turns: tuple[Turn, ...]
    """With one `<image>` marker for each image."""
    images: tuple[ImageRef, ...]
    """In reading order."""

    @property
    def num_answer_images(self) -> int:
        """Number of images in assistant turns: those that the model learns to draw."""
        return sum(turn.text.count(DEFAULT_IMAGE_TOKEN) for turn in self.turns if turn.role == "assistant")


Build = Callable[[Record, np.random.Generator, Any, VideoInfo | None], Conversation]


@dataclass(frozen=True)
class Task:
    """One kind of training data."""

    name: str
    """Name in mixture files."""
    options_type: type
    """Frozen dataclass of the options, all with defaults; its constructor checks their values."""
    build: Build
    """Makes the conversation; pure, so the same record, generator state, options and video give the same result."""
    needs_video: bool = False
    """Whether records name a video, whose [`VideoInfo`] `build` needs."""
    draws: bool = False
    """Whether every conversation must have an image in an answer."""

    def __call__(
        self, record: Record, rng: np.random.Generator, options: Any, video: VideoInfo | None = None
    ) -> Conversation:
        """Make the conversation of a record, and check it; no file is opened. `rng` picks wordings and frames.

        Raises:
            RecordError: If the record does not fit the task.
        """
        if self.needs_video and record.video is None:
            refuse_unread(record)
            raise record.error(
                "missing_video",
                f'the task {self.name} needs a video; name its path in "video", or declare another task',
            )
        try:
            conversation = self.build(record, rng, options, video)
            check_conversation(record, conversation.turns, len(conversation.images))
        except RecordError as error:
            if error.kind == "image_count" and not record.images:
                refuse_unread(record, error)
            raise
        if not conversation.images:
            refuse_unread(record)
        if self.draws and not conversation.num_answer_images:
            raise record.error("no_answer_image", f"the task {self.name} trains drawing, but no answer has an image")
        return conversation


def without_markers(text: str) -> str:
    """The text without its image markers, wrapped or not, and stripped."""
    return "".join(part for part in split_at_images(text) if isinstance(part, str)).strip()


def pick(rng: np.random.Generator, choices: Sequence[Chosen]) -> Chosen:
    """One of the choices, each with the same probability."""
    return choices[int(rng.integers(len(choices)))]


def fill(wording: str, **values: str) -> str:
    """Fill the `{slots}` of a wording; braces in the values are literal."""
    return re.sub(r"\{(\w+)\}", lambda slot: values[slot[1]], wording)


def check_positive(name: str, value: Any) -> None:
    """Check an option that must be a number above 0."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a number above 0, not {value!r}")


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Check an option that must be a whole number."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number, at least {least}, not {value!r}")


def check_field_name(name: str, value: Any) -> None:
    """Check an option that names a field of the records, or is None."""
    if value is not None and (not isinstance(value, str) or not value):
        raise ValueError(f"{name} must be the name of a field, not {value!r}")
