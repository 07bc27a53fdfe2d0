"""Loads images from references: finds the file, and takes the frame or part of it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageDraw, ImageFont

from metamorph.data.media.refs import Box, ImageRef
from metamorph.data.media.video import VideoInfo, probe_video, read_frames
from metamorph.data.records import Record
from metamorph.data.sources.tars import TarSample
from metamorph.models.image_files import MediaError, load_image, read_size


_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_MAX_PATH = 4096
"""Longest path in bytes that Linux opens."""
BOX_COLOURS = ("red", "lime", "blue", "yellow", "magenta", "cyan")


class FolderStore:
    """Files in a folder.

    Relative paths may not leave the folder. Absolute paths are allowed, and so are links that lead out of the folder:
    they are the user's own.
    """

    def __init__(self, image_folder: str | os.PathLike[str]) -> None:
        self.image_folder = Path(image_folder)

    def open(self, path: str) -> Path:
        """Join a path to the folder; the file need not exist."""
        return resolve_image_path(path, self.image_folder)

    def exists(self, path: str) -> bool:
        """Whether there is such a file."""
        try:
            return self.open(path).is_file()
        except OSError:  # a name that is too long, or a folder without permission
            return False


MediaStore = FolderStore | TarSample
"""The images and videos of a record. `open(path)` returns a path, or an open file that the caller closes; it raises a
[`MediaError`] if the path is not allowed."""


def resolve_image_path(path: str, image_folder: str | os.PathLike[str]) -> Path:
    """Join a path from a record to the image folder, which relative paths may not leave.

    Raises:
        MediaError: If a relative path leaves the folder, or if it is an address or the content of a file.
    """
    if path.startswith("data:") or len(path) > _MAX_PATH or not _is_path(path):
        raise MediaError(
            "missing_image",
            f"{path[:40]!r}… ({len(path)} characters) is not the path of a file; a record cannot contain an image: "
            "save it as a file and name that",
        )
    if _ADDRESS.match(path):
        raise MediaError(
            "missing_image", f"{path!r:.80} is an address, and nothing is downloaded: save the file and name its path"
        )
    if os.path.isabs(path):
        return Path(path)
    normal = os.path.normpath(path)
    if normal == os.pardir or normal.startswith(os.pardir + os.sep):
        raise MediaError("outside_folder", f"the path {path!r} leaves the image folder {image_folder}; remove the '..'")
    return Path(image_folder) / normal


def _is_path(text: str) -> bool:
    """Whether a file can have that name: no NUL, and no half character, which cannot be encoded."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def load_all(refs: Sequence[ImageRef], store: MediaStore) -> list[Image.Image]:
    """Load the images of a conversation as upright RGB, in order; each file is opened and decoded once.

    Raises:
        MediaError: If a file is missing or cannot be read, or a box lies outside its image.
    """
    times: dict[str, list[float]] = {}
    for ref in refs:
        if ref.time is not None:
            times.setdefault(ref.path, []).append(ref.time)
    loaded: dict[tuple[str, float | None], Image.Image] = {}
    for path, wanted in times.items():
        with _opened(store, path, "missing_video") as (file, name):
            frames = read_frames(file, wanted, name=name)
        loaded.update({(path, time): frame for time, frame in zip(wanted, frames, strict=True)})
    for ref in refs:
        if (ref.path, ref.time) not in loaded:
            with _opened(store, ref.path, "missing_image") as (file, name):
                loaded[ref.path, ref.time] = load_image(file, name=name)
    return [_finished(loaded[ref.path, ref.time], ref) for ref in refs]


def image_size(path: str, store: MediaStore) -> tuple[int, int]:
    """Width and height of an upright image, read without decoding it."""
    with _opened(store, path, "missing_image") as (file, name):
        return read_size(file, name=name)


def probe(path: str, store: MediaStore) -> VideoInfo:
    """Times of the frames of a video, read without decoding it."""
    with _opened(store, path, "missing_video") as (file, name):
        return probe_video(file, name=name)


@contextmanager
def record_errors(record: Record) -> Iterator[None]:
    """Turn an error of an image or a video into one of the record that names it."""
    try:
        yield
    except MediaError as error:
        raise record.error(error.kind, error.detail) from error


@contextmanager
def _opened(store: MediaStore, path: str, missing: str) -> Iterator[tuple[Path | BinaryIO, str]]:
    """A file of a store, and its name in error messages; `missing` is the kind of error if there is no such file."""
    try:
        file = store.open(path)
    except FileNotFoundError as error:
        raise MediaError(missing, f"there is no file {path}") from error
    try:
        yield file, str(file) if isinstance(file, Path) else path
    finally:
        if not isinstance(file, Path):
            file.close()


def _finished(image: Image.Image, ref: ImageRef) -> Image.Image:
    """The image with boxes drawn into it, cut to its crop."""
    if ref.boxes:
        image = image.copy()  # other references may need it without boxes
        for index, (name, box) in enumerate(ref.boxes):
            draw_box(image, _pixels(box, image, ref), name, BOX_COLOURS[index % len(BOX_COLOURS)])
    return image if ref.crop is None else image.crop(_pixels(ref.crop, image, ref))


def _pixels(box: Box, image: Image.Image, ref: ImageRef) -> tuple[int, int, int, int]:
    pixels = box.pixels(*image.size)
    if pixels is None:
        raise MediaError(
            "bad_box",
            f"{ref.path}: the box {box.left:g}, {box.top:g}, {box.right:g}, {box.bottom:g} lies outside the image of "
            f"{image.width}x{image.height} pixels; correct it, or box_units and box_format in the source's options",
        )
    return pixels


def draw_box(image: Image.Image, box: tuple[int, int, int, int], name: str, colour: str) -> None:
    """Draw a frame into an RGB image, in place, and its name (which may be empty) above or inside it.

    Lines and letters scale with the image, so that they stay visible when it is resized for the vision tower. Right and
    bottom of the box are exclusive.
    """
    left, top, right, bottom = box
    draw = ImageDraw.Draw(image)
    width = max(1, round(min(image.size) / 100))
    draw.rectangle((left, top, right - 1, bottom - 1), outline=colour, width=width)
    if name:
        font = ImageFont.load_default(size=max(10, round(min(image.size) / 18)))
        height = draw.textbbox((0, 0), name, font=font)[3] + 2
        place = (left, top - height if top >= height else top + width)
        draw.rectangle(draw.textbbox(place, name, font=font), fill=colour)
        draw.text(place, name, fill="black" if colour in ("lime", "yellow", "cyan") else "white", font=font)
