"""Loads images from references: finds the file, and takes the frame or part of it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from metamorph.data.media.images import BOX_COLOURS, draw_box, resolve_image_path
from metamorph.data.media.refs import Box, ImageRef
from metamorph.data.media.video import VideoInfo, probe_video, read_frames
from metamorph.data.records import Record
from metamorph.data.sources.tars import TarSample
from metamorph.models.image_files import MAX_IMAGE_PIXELS, MediaError, load_image, read_size


__all__ = [
    "MAX_IMAGE_PIXELS",
    "FolderStore",
    "MediaError",
    "MediaStore",
    "image_size",
    "load",
    "load_all",
    "load_image",
    "media_of",
    "probe",
]


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


def load(ref: ImageRef, store: MediaStore) -> Image.Image:
    """Load one image as upright RGB; see [`load_all`]."""
    return load_all([ref], store)[0]


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
def media_of(record: Record) -> Iterator[None]:
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
