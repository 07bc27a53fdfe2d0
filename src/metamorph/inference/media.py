"""Images and videos of a prompt: frames of a video, and images and frames in the order of their markers."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from metamorph.data.media.video import probe_video, read_frames
from metamorph.data.records import VIDEO_MARKER
from metamorph.data.tasks.video_qa import sample_times
from metamorph.models.sequence.constants import DEFAULT_IMAGE_TOKEN


Frames = Sequence[Image.Image]


def load_video(
    file: str | Path, fps: float = 1.0, max_frames: int = 8, *, name: str | None = None, max_pixels: float = math.inf
) -> list[Image.Image]:
    """Frames of a video at `fps`, or `max_frames` evenly spread ones if these are too many, as in the task `video_qa`.

    A video that cannot be read, or whose frames have more than `max_pixels` together, is a `MediaError` with `name`.
    """
    times = sample_times(probe_video(file, name=name), fps, max_frames)
    return read_frames(file, times, name=name, max_pixels=max_pixels / len(times))


def place_media(
    prompt: str, images: Sequence[Image.Image], videos: Sequence[Frames] = ()
) -> tuple[str, tuple[Image.Image, ...]]:
    """The prompt with an `<image>` marker for each image and frame, and these in the order of the markers.

    A prompt may mark where images (`<image>`) and videos (`<video>`) belong; those without markers come first.
    """
    check_markers(prompt, len(images), len(videos))
    for marker, count in ((VIDEO_MARKER, len(videos)), (DEFAULT_IMAGE_TOKEN, len(images))):
        if marker not in prompt:
            prompt = f"{marker}\n" * count + prompt
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


def check_markers(prompt: str, num_images: int, num_videos: int) -> None:
    """Raise a `ValueError` unless the prompt has no markers of a kind, or one for each image or video."""
    for marker, count, kind in (
        (DEFAULT_IMAGE_TOKEN, num_images, "image"),
        (VIDEO_MARKER, num_videos, "video"),
    ):
        found = prompt.count(marker)
        if found not in (0, count):
            raise ValueError(f"the prompt has {found} {marker}, but there are {count} {kind}(s)")
