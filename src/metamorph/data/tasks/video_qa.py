"""`video_qa`: questions about a video, which the model sees as a few frames."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from metamorph.data.media.refs import ImageRef
from metamorph.data.media.video import VideoInfo
from metamorph.data.records import VIDEO_MARKER, Record, Turn
from metamorph.data.tasks.base import Conversation, Task, check_count, check_positive
from metamorph.models.sequence.constants import DEFAULT_IMAGE_TOKEN
from metamorph.models.sequence.conversations import split_at_images


@dataclass(frozen=True)
class VideoQaOptions:
    """Options of `video_qa`."""

    fps: float = 1.0
    """Frames per second of the sample; fewer if the video has fewer."""
    max_frames: int = 8
    """Most frames of a video; from a longer one this number is taken, evenly spread from beginning to end."""

    def __post_init__(self) -> None:
        check_positive("fps", self.fps)
        check_count("max_frames", self.max_frames)


def _video_qa(
    record: Record, rng: np.random.Generator, options: VideoQaOptions, video: VideoInfo | None
) -> Conversation:
    assert video is not None  # Task.needs_video
    times = sample_times(video, options.fps, options.max_frames)
    turns = [Turn(turn.role, turn.text.replace(VIDEO_MARKER, DEFAULT_IMAGE_TOKEN)) for turn in record.turns]
    places = [index for index, turn in enumerate(turns) for _ in range(turn.text.count(DEFAULT_IMAGE_TOKEN))]
    questions = [index for index, turn in enumerate(turns) if turn.role == "user"]
    if len(places) > 1:
        raise record.error("image_count", f"the turns have {len(places)} markers, but there is one video; keep one")
    if not questions or not set(places) <= set(questions):
        raise record.error(
            "role_order", "the task video_qa shows the video in a human turn, and answers it in words in a gpt turn"
        )
    if not places:
        turns[questions[0]] = Turn("user", f"{DEFAULT_IMAGE_TOKEN}\n{turns[questions[0]].text}")
    frames = DEFAULT_IMAGE_TOKEN * len(times)
    return Conversation(
        turns=tuple(
            Turn(turn.role, "".join(part if isinstance(part, str) else frames for part in split_at_images(turn.text)))
            for turn in turns
        ),
        images=tuple(ImageRef(record.video or "", time=time) for time in times),
    )


def sample_times(video: VideoInfo, fps: float, max_frames: int) -> list[float]:
    """Times of different frames of a video in seconds, ascending and evenly spread.

    Frames are taken at `fps`, from the first one on. If these are more than `max_frames`, that number is spread from
    the first to the last. There are fewer if several times fall into the same frame.
    """
    # Files often lack the length of the last frame, so only the beginnings of frames count.
    count = math.floor(max(video.times[-1], math.nextafter(video.duration, 0)) * fps) + 1
    grid = np.arange(count) / fps if count <= max_frames else np.linspace(0, (count - 1) / fps, max_frames)
    return [video.times[index] for index in sorted({video.frame_at(time) for time in grid.tolist()})]


VIDEO_QA = Task("video_qa", VideoQaOptions, _video_qa, needs_video=True)
"""Questions about a video."""
