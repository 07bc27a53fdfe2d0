"""Videos for tests: flat colours, one for each frame, at any times."""

from fractions import Fraction
from pathlib import Path

import pytest
from PIL import Image


av = pytest.importorskip("av", reason="videos need the extra 'video'")

COLOURS = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (220, 220, 40), (30, 210, 210), (210, 40, 210), (240, 240, 240)]


def colour(index: int) -> tuple[int, int, int]:
    """The colour of frame `index`."""
    return COLOURS[index % len(COLOURS)]


def write_video(
    path: Path,
    times: list[float],
    *,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    size: tuple[int, int] = (64, 48),
    rotation: int = 0,
    keyframe_every: int = 12,
    last: float = 0.1,
) -> Path:
    """Write a video whose frame i, shown from `times[i]` seconds on, has the colour i; the last lasts `last` s."""
    unit = Fraction(1, 1000)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=1000)
        stream.width, stream.height = size
        stream.pix_fmt = pix_fmt
        stream.codec_context.time_base = unit
        stream.codec_context.gop_size = keyframe_every
        if rotation:
            stream.set_display_rotation(rotation)
        for index, (time, end) in enumerate(zip(times, [*times[1:], times[-1] + last], strict=True)):
            frame = av.VideoFrame.from_image(Image.new("RGB", size, colour(index)))
            frame.pts, frame.time_base = round(time * 1000), unit
            frame.duration = round((end - time) * 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def index_of(image: Image.Image) -> int:
    """Which frame an image is, by its colour; fails if it is none of them."""
    pixel = image.getpixel((image.width // 2, image.height // 2))
    distances = [max(abs(a - b) for a, b in zip(pixel, known, strict=True)) for known in COLOURS]
    assert min(distances) < 25, f"{pixel} is no colour of a frame"
    return distances.index(min(distances))
