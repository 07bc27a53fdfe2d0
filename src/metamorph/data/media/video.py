"""Videos through PyAV: the times of all frames, and the frames at given times.

All times are seconds from the first frame. A frame is shown until the time of the next one, so even a video with a
variable frame rate, or with less than one frame per second, has a frame at every time.
"""

from __future__ import annotations

import math
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from metamorph.flags.extras import install_command
from metamorph.models.image_files import MAX_IMAGE_PIXELS, MediaError, check_regular


VideoFile = str | os.PathLike[str] | BinaryIO
"""A path, or an open, seekable binary file, which stays open."""

CONTAINERS = ("mov", "mp4", "matroska", "webm", "avi", "mpeg", "mpegts", "mpegvideo", "asf", "flv")
"""Supported containers, by FFmpeg's names. Others, such as playlists (which read other files) and text (which FFmpeg
draws), are not safe for files from untrusted sources."""
CODECS = (
    *("h264", "hevc", "libdav1d", "libaom-av1", "av1", "vp8", "libvpx", "vp9", "libvpx-vp9"),
    *("mpeg1video", "mpeg2video", "mpeg4", "h263", "flv", "msmpeg4v1", "msmpeg4v2", "msmpeg4"),
    *("wmv1", "wmv2", "wmv3", "vc1", "mjpeg", "png", "ffv1", "huffyuv", "prores", "dnxhd", "rawvideo"),
)
"""Supported codecs, by the names of FFmpeg's decoders."""
_ROUNDING = 1e-6
"""Tolerance in seconds when matching a time to a frame that comes after it."""
_HD_LINES = 720
"""Videos without a colour space use BT.709 from this number of lines on, and BT.601 below."""
_UNSPECIFIED = 2
"""Code of an unspecified colour space (ITU-T H.273)."""
_QUARTER_TURNS = {
    90: Image.Transpose.ROTATE_90,
    180: Image.Transpose.ROTATE_180,
    270: Image.Transpose.ROTATE_270,
}


@dataclass(frozen=True)
class VideoInfo:
    """Facts about a video that are known without decoding it."""

    times: tuple[float, ...]
    """Time of each frame in seconds; ascending, at least one, the first is 0."""
    duration: float
    """Length in seconds, including the time for which the last frame is shown."""
    stamps: tuple[int, ...] = ()
    """Time stamp of each frame in units of the stream's time base, ascending."""
    keys: tuple[int, ...] = ()
    """Time stamps of the frames at which decoding can start, ascending; the first frame is always included."""

    @property
    def num_frames(self) -> int:
        """Number of frames."""
        return len(self.times)

    def frame_at(self, time: float) -> int:
        """Index of the frame that is shown at `time` seconds; the first before the start, the last after the end."""
        return max(bisect_right(self.times, time + _ROUNDING) - 1, 0)


def probe_video(file: VideoFile, *, name: str | None = None) -> VideoInfo:
    """Read the times of the frames of a video. Nothing is decoded, but the file is read to its end.

    The result for a file on disk is cached, because its frames are read soon after. `name` is used in error messages.

    Raises:
        MediaError: If there is no such file, it is not a video of one of `CONTAINERS` and `CODECS`, or its frames have
            more than `MAX_IMAGE_PIXELS`.
        ModuleNotFoundError: Without PyAV.
    """
    if isinstance(file, (str, os.PathLike)) and os.path.isfile(file):
        status = os.stat(file)
        return _probe_path(os.fspath(file), name, status.st_size, status.st_mtime_ns)
    with _decoding(file, name) as (container, stream, _):
        return _scan(container, stream)


@lru_cache(maxsize=16)
def _probe_path(path: str, name: str | None, size: int, mtime_ns: int) -> VideoInfo:
    with _decoding(path, name) as (container, stream, _):
        return _scan(container, stream)


def read_frames(
    file: VideoFile, times: Sequence[float], *, name: str | None = None, max_pixels: float = math.inf
) -> list[Image.Image]:
    """Decode the frames that are shown at `times` (in any order), as upright RGB.

    Decoding jumps from keyframe to keyframe, and no frame is decoded twice. A frame may have `max_pixels`, and never
    more than `MAX_IMAGE_PIXELS`.

    Raises:
        MediaError: As [`probe_video`], or if a frame cannot be decoded.
        ModuleNotFoundError: Without PyAV.
    """
    info = probe_video(file, name=name)
    wanted = [info.stamps[info.frame_at(time)] for time in times]
    with _decoding(file, name, max_pixels) as (container, stream, name):
        decoded = {stamp: _upright(frame) for stamp, frame in _decode(container, stream, sorted({*wanted}), info)}
    if len(decoded) < len({*wanted}):
        raise MediaError("unreadable_video", f"{name} has no frame that can be decoded; replace it")
    return [decoded[stamp] for stamp in wanted]


@contextmanager
def _decoding(file: VideoFile, name: str | None, max_pixels: float = math.inf) -> Iterator[tuple[Any, Any, str]]:
    """Container, video stream and name of a file; any error becomes a [`MediaError`]."""
    try:
        import av
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"reading videos needs PyAV, which is not installed: {install_command('video')}"
        ) from error
    name = str(file) if name is None else name
    limit = int(min(max_pixels, MAX_IMAGE_PIXELS))
    if isinstance(file, (str, os.PathLike)):
        check_regular(file, "unreadable_video", f"{name} cannot be read as a video")
        # A file URL, so that no part of a name can be taken for another protocol.
        opened: Any = f"file:{Path(file).absolute()}"
    else:
        file.seek(0)
        opened = file
    try:
        # FFmpeg checks the limit before it allocates memory for a frame: later frames may be larger.
        limits = {"max_pixels": str(limit), "codec_whitelist": ",".join(CODECS)}
        formats = {"protocol_whitelist": "file", "format_whitelist": ",".join(CONTAINERS)}
        with av.open(opened, options=limits, container_options=formats) as container:
            stream = container.streams.best("video")
            codec = None if stream is None else stream.codec_context
            if codec is None or codec.codec.name not in CODECS:
                raise MediaError("unreadable_video", f"{name} has no video stream that can be decoded; replace it")
            if codec.width * codec.height > limit:
                raise MediaError(
                    "image_too_large",
                    f"the frames of {name} have {codec.width}x{codec.height} pixels, more than the limit of "
                    f"{limit}; resize it",
                )
            codec.options = limits
            codec.thread_count = 1  # the workers of the data loader are the parallelism
            yield container, stream, name
    except MediaError:
        raise
    except FileNotFoundError as error:
        raise MediaError("missing_video", f"there is no video file {name}; is the image folder right?") from error
    except (av.FFmpegError, OSError, ValueError) as error:
        reason: Any = error
        if isinstance(error, av.ArgumentError):  # FFmpeg gives no reason for what the options forbid
            known = ", ".join(CONTAINERS)
            reason = f"its container is not one of {known}, or a frame has more than {limit} pixels"
        raise MediaError("unreadable_video", f"{name} cannot be read as a video ({reason}); replace it") from error


def _scan(container: Any, stream: Any) -> VideoInfo:
    """Read the time stamps of all packets. The number of frames in a header is often missing or wrong."""
    stamps, keys, end = set(), set(), 0
    for packet in container.demux(stream):
        stamp = packet.dts if packet.pts is None else packet.pts
        if stamp is None or not packet.size or packet.is_discard:  # the last, empty one; and what edit lists cut off
            continue
        stamps.add(stamp)
        end = max(end, stamp + (packet.duration or 0))
        if packet.is_keyframe:
            keys.add(stamp)
    if not stamps:
        raise ValueError("it has no frame with a time stamp")
    first, unit = min(stamps), Fraction(stream.time_base)
    return VideoInfo(
        times=tuple(float((stamp - first) * unit) for stamp in sorted(stamps)),
        duration=float((max(end, *stamps, first) - first) * unit),
        stamps=tuple(sorted(stamps)),
        keys=tuple(sorted(keys | {first})),
    )


def _decode(container: Any, stream: Any, wanted: Sequence[int], info: VideoInfo) -> Iterator[tuple[int, Any]]:
    """Each of the ascending time stamps with its frame; where there is none (a packet may have no visible frame), the
    one before it, as in a player.
    """
    frames = _stamped(container, stream)
    shown, following = None, next(frames, None)
    for stamp in wanted:
        key = info.keys[bisect_right(info.keys, stamp) - 1]
        if following is not None and key > following.pts:
            frames = _stamped(container, stream, seek_to=key)
            shown, following = None, next(frames, None)
            if following is None or following.pts > stamp:  # some containers cannot seek exactly
                frames = _stamped(container, stream, seek_to=info.stamps[0])
                following = next(frames, None)
        while following is not None and following.pts <= stamp:
            shown, following = following, next(frames, None)
        frame = following if shown is None else shown
        if frame is not None:
            yield stamp, frame


def _stamped(container: Any, stream: Any, seek_to: int | None = None) -> Iterator[Any]:
    """Frames in order of time, from the keyframe at or before a time stamp."""
    if seek_to is not None:
        container.seek(seek_to, stream=stream)
    return (frame for frame in container.decode(stream) if frame.pts is not None)


def _upright(frame: Any) -> Image.Image:
    """A frame as an RGB image, rotated as a player would."""
    colours = {}
    if frame.colorspace == _UNSPECIFIED and frame.height >= _HD_LINES and not frame.format.is_rgb:
        colours["src_colorspace"] = "ITU709"
    image = frame.to_image(**colours)
    turn = _QUARTER_TURNS.get(round(frame.rotation) % 360)
    return image if turn is None else image.transpose(turn)
