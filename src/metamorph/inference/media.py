"""Videos of a prompt: their frames, which the model sees as images."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from metamorph.data.media.video import probe_video, read_frames
from metamorph.data.tasks.video_qa import sample_times


def load_video(file: str | Path, fps: float = 1.0, max_frames: int = 8) -> list[Image.Image]:
    """Frames of a video at `fps`, or `max_frames` evenly spread ones if these are too many, as in the task `video_qa`.

    A video that cannot be read is a `MediaError`.
    """
    return read_frames(file, sample_times(probe_video(file), fps, max_frames))
