"""`frame_prediction`: the model sees some frames of a video and draws others.

Each template distributes frames over the turns. A turn gets one marker for each of its frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from metamorph.data.media.refs import ImageRef
from metamorph.data.media.video import VideoInfo
from metamorph.data.records import Record, Turn
from metamorph.data.tasks import wording
from metamorph.data.tasks.base import (
    Conversation,
    Task,
    check_count,
    check_field_name,
    check_positive,
    fill,
    pick,
    without_markers,
)
from metamorph.models.sequence.constants import DEFAULT_IMAGE_TOKEN


_Part = tuple[Turn, tuple[float, ...]]
"""One turn, and the times of its frames."""

TEMPLATES = {
    "forward": wording.FORWARD,
    "split": wording.SPLIT,
    "backward": wording.BACKWARD,
    "alternate": wording.ALTERNATE,
    "reorder": wording.REORDER,
    "interval": wording.INTERVAL,
    "next_k": wording.NEXT_K,
}
"""Wordings of each way to distribute the frames of a video over turns, see `_distribute`."""


def _distribute(template: str, frames: Sequence[float], rng: np.random.Generator, max_next: int) -> list[_Part]:
    """Distribute two or more frames over the turns of a conversation; at least one of them is drawn."""
    if template == "alternate":  # frames are alternately seen and drawn
        parts: list[_Part] = []
        for index in range(0, len(frames) - 1, 2):
            wordings = wording.ALTERNATE if parts else wording.ALTERNATE_FIRST
            parts += _seen_and_drawn(rng, wordings, frames[index : index + 1], frames[index + 1 : index + 2])
        return parts
    if template == "forward":  # the first frame is seen, all others are drawn
        seen, drawn = frames[:1], frames[1:]
    elif template == "split":  # the frames before a random place are seen, those after it are drawn
        place = int(rng.integers(1, len(frames)))
        seen, drawn = frames[:place], frames[place:]
    elif template == "backward":  # the last frame is seen, the others are drawn in reverse order
        seen, drawn = frames[-1:], frames[-2::-1]
    elif template == "reorder":  # all frames are seen out of order and drawn in order
        seen, drawn = list(frames), frames
        while seen == list(frames):
            rng.shuffle(seen)
    elif template == "interval":  # one frame is seen, and the one a stated number of seconds later is drawn
        first, later = sorted(rng.choice(len(frames), size=2, replace=False).tolist())
        seen, drawn = frames[first : first + 1], frames[later : later + 1]
    else:  # next_k: some frames are seen, and a stated number of the following ones is drawn
        count = int(rng.integers(1, min(max_next, len(frames) - 1) + 1))
        place = int(rng.integers(1, len(frames) - count + 1))
        seen, drawn = frames[:place], frames[place : place + count]
    return _seen_and_drawn(rng, TEMPLATES[template], seen, drawn)


def _seen_and_drawn(
    rng: np.random.Generator, wordings: Sequence[str], seen: Sequence[float], drawn: Sequence[float]
) -> list[_Part]:
    seconds = drawn[-1] - seen[-1]
    question = fill(
        pick(rng, wordings),
        frames=DEFAULT_IMAGE_TOKEN * len(seen),
        count=f"{len(drawn)} frame{'s' if len(drawn) != 1 else ''}",
        seconds=f"{seconds:.{1 if seconds >= 0.1 else 3}f}",
    )
    answer = DEFAULT_IMAGE_TOKEN * len(drawn)
    return [(Turn("user", question), tuple(seen)), (Turn("assistant", answer), tuple(drawn))]


@dataclass(frozen=True)
class FramePredictionOptions:
    """Options of `frame_prediction`."""

    fps: float = 1.0
    """Frames per second of the sample; fewer if the video has fewer."""
    max_frames: int = 6
    """Most frames of a conversation, at least 2. A longer video contributes a random stretch of this number."""
    templates: tuple[str, ...] = tuple(TEMPLATES)
    """Names of the templates, one of which is picked for each record."""
    max_next: int = 3
    """Most frames that `next_k` asks for."""
    caption_field: str | None = None
    """Field of a text that describes the video, which precedes the question; none by default."""

    def __post_init__(self) -> None:
        check_positive("fps", self.fps)
        check_count("max_frames", self.max_frames, least=2)
        check_count("max_next", self.max_next)
        check_field_name("caption_field", self.caption_field)
        if not isinstance(self.templates, (list, tuple)) or not self.templates:
            raise ValueError(f"templates must be a list of names, not {self.templates!r}")
        for name in self.templates:
            if name not in TEMPLATES:
                raise ValueError(f"template {name!r} is unknown; use some of {', '.join(TEMPLATES)}")
        object.__setattr__(self, "templates", tuple(self.templates))  # YAML has lists; options are hashable


def _frame_prediction(
    record: Record, rng: np.random.Generator, options: FramePredictionOptions, video: VideoInfo | None
) -> Conversation:
    assert video is not None  # Task.needs_video
    if video.num_frames < 2:
        raise record.error(
            "too_few_frames", f"{record.video!r} has one frame, so there is none to predict; remove the record"
        )
    frames = _stretch(video, rng, options)
    parts = _distribute(pick(rng, options.templates), frames, rng, options.max_next)
    turns = [turn for turn, _ in parts]
    turns[0] = Turn("user", _caption(record, rng, options.caption_field) + turns[0].text)
    images = tuple(ImageRef(record.video or "", time=time) for _, shown in parts for time in shown)
    return Conversation(tuple(turns), images)


def _stretch(video: VideoInfo, rng: np.random.Generator, options: FramePredictionOptions) -> list[float]:
    """Times of two or more different frames at the wanted rate, from a random place on."""
    span = video.times[-1]
    count = min(int(span * options.fps) + 1, options.max_frames)
    start = rng.uniform(0, max(span - (count - 1) / options.fps, 0))
    places = sorted({video.frame_at(start + index / options.fps) for index in range(count)})
    if len(places) == 1:  # the video is too short, or its frames are too far apart
        first = min(places[0], video.num_frames - 2)
        places = [first, max(video.frame_at(video.times[first] + 1 / options.fps), first + 1)]
    return [video.times[place] for place in places]


def _caption(record: Record, rng: np.random.Generator, field: str | None) -> str:
    if field is None:
        return ""
    caption = record.fields.get(field)
    if not isinstance(caption, str) or not without_markers(caption):
        raise record.error("bad_field", f'"{field}" must describe the video, not {caption!r:.80}')
    return fill(pick(rng, wording.SHOWN_IN_VIDEO), caption=without_markers(caption))


FRAME_PREDICTION = Task("frame_prediction", FramePredictionOptions, _frame_prediction, needs_video=True, draws=True)
"""A video without text: the model predicts frames from other frames."""
