"""Videos of a prompt: their frames, which the model sees as images."""

from __future__ import annotations

import math
from pathlib import Path

from PIL import Image

from metamorph.data.media.video import probe_video, read_frames
from metamorph.data.tasks.video_qa import sample_times


def load_video(
    file: str | Path, fps: float = 1.0, max_frames: int = 8, *, name: str | None = None, max_pixels: float = math.inf
) -> list[Image.Image]:
    """Frames of a video at `fps`, or `max_frames` evenly spread ones if these are too many, as in the task `video_qa`.

    A video that cannot be read, or whose frames have more than `max_pixels` together, is a `MediaError` with `name`.
    """
    times = sample_times(probe_video(file, name=name), fps, max_frames)
    return read_frames(file, times, name=name, max_pixels=max_pixels / len(times))
