"""`instruction`: the turns of the record as they are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from metamorph.data.media.refs import ImageRef
from metamorph.data.media.video import VideoInfo
from metamorph.data.records import Record
from metamorph.data.tasks.base import Conversation, Task


@dataclass(frozen=True)
class InstructionOptions:
    """The task has no options."""


def _build(
    record: Record, rng: np.random.Generator, options: InstructionOptions, video: VideoInfo | None
) -> Conversation:
    if record.video is not None:
        raise record.error(
            "bad_video_field",
            f"the record names the video {record.video!r}, which the task 'instruction' does not read; declare its "
            "source with task: video_qa",
        )
    return Conversation(record.turns, tuple(ImageRef(path) for path in record.images))


INSTRUCTION = Task("instruction", InstructionOptions, _build)
"""Questions, instructions and plain text; images in `gpt` turns are learned."""
