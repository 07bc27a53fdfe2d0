"""From a reference to a picture: where files lie, which frame or part of them is meant."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol

from PIL import Image

from metamorph.data.media.images import BOX_COLOURS, draw_box, resolve_image_path
from metamorph.data.media.refs import Box, ImageRef
from metamorph.data.media.video import VideoInfo, probe_video, read_frames
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
    "probe",
]


class MediaStore(Protocol):
    """Where the images and videos of a source are kept, by the paths that its records name."""

    def open(self, path: str) -> Path | BinaryIO:
        """Find a file.

        Returns:
            Its path, or an open, seekable file that the caller closes.

        Raises:
            MediaError: If the path is not allowed.
            FileNotFoundError: If the store knows at once that there is no such file; a path need not exist.
        """

    def exists(self, path: str) -> bool:
        """Whether there is such a file.

        Raises:
            MediaError: If the path is not allowed.
        """


class FolderStore:
    """Files in a folder.

    Relative paths may not leave the folder. Absolute paths are taken as they are, and links inside the folder may lead
    out of it: they are the user's own.

    Args:
        image_folder: Folder that relative paths start at.
    """

    def __init__(self, image_folder: str | os.PathLike[str]) -> None:
        self.image_folder = Path(image_folder)

    def open(self, path: str) -> Path:
        """Join a path to the folder; the file need not exist. See [`MediaStore`]."""
        return resolve_image_path(path, self.image_folder)

    def exists(self, path: str) -> bool:
        """Whether there is such a file. See [`MediaStore`]."""
        try:
            return self.open(path).is_file()
        except OSError:  # a name that is too long, or a folder that may not be searched
            return False


def load(ref: ImageRef, store: MediaStore) -> Image.Image:
    """Read one picture as upright RGB; see [`load_all`] for the pictures of a conversation.

    Raises:
        MediaError: If there is no such file, or it cannot be read.
    """
    return load_all([ref], store)[0]


def load_all(refs: Sequence[ImageRef], store: MediaStore) -> list[Image.Image]:
    """Read the pictures of a conversation as upright RGB, in order; each file is opened and decoded once.

    Args:
        refs: The pictures.
        store: Where their files are.

    Raises:
        MediaError: If a file is missing or cannot be read, or a box lies outside its image.
    """
    times: dict[str, list[float]] = {}
    for ref in refs:
        if ref.time is not None:
            times.setdefault(ref.path, []).append(ref.time)
    whole: dict[tuple[str, float | None], Image.Image] = {}
    for path, wanted in times.items():
        with opened(store, path, "missing_video") as file:
            frames = read_frames(file, wanted, name=_name(file, path))
        whole.update({(path, time): frame for time, frame in zip(wanted, frames, strict=True)})
    pictures = []
    for ref in refs:
        place = (ref.path, ref.time)
        if place not in whole:
            with opened(store, ref.path, "missing_image") as file:
                whole[place] = load_image(file, name=_name(file, ref.path))
        pictures.append(_finished(whole[place], ref))
    return pictures


def image_size(path: str, store: MediaStore) -> tuple[int, int]:
    """Read width and height of an upright image, without decoding it.

    Args:
        path: Path as a record names it.
        store: Where the file is.

    Raises:
        MediaError: If there is no such file, or it is no image.
    """
    with opened(store, path, "missing_image") as file:
        return read_size(file, name=_name(file, path))


def probe(path: str, store: MediaStore) -> VideoInfo:
    """Read when the frames of a video are shown, without decoding it.

    Args:
        path: Path as a record names it.
        store: Where the file is.

    Raises:
        MediaError: If there is no such file, or it is no video.
    """
    with opened(store, path, "missing_video") as file:
        return probe_video(file, name=_name(file, path))


@contextmanager
def opened(store: MediaStore, path: str, missing: str) -> Iterator[Path | BinaryIO]:
    """A file of a store, closed at the end.

    Args:
        store: The store.
        path: Path as a record names it.
        missing: Kind of the error if there is no such file.
    """
    try:
        file = store.open(path)
    except FileNotFoundError as error:
        raise MediaError(missing, f"there is no file {path}") from error
    try:
        yield file
    finally:
        if not isinstance(file, Path):
            file.close()


def _name(file: Path | BinaryIO, path: str) -> str:
    """What messages call a file."""
    return str(file) if isinstance(file, Path) else path


def _finished(image: Image.Image, ref: ImageRef) -> Image.Image:
    """The image with boxes drawn into it, cut to its crop."""
    if ref.boxes:
        image = image.copy()  # others may need it as it was
        for index, (name, box) in enumerate(ref.boxes):
            draw_box(image, _pixels(box, image, ref), name, BOX_COLOURS[index % len(BOX_COLOURS)])
    return image if ref.crop is None else image.crop(_pixels(ref.crop, image, ref))


def _pixels(box: Box, image: Image.Image, ref: ImageRef) -> tuple[int, int, int, int]:
    pixels = box.pixels(*image.size)
    if pixels is None:
        raise MediaError(
            "bad_box",
            f"{ref.path}: the box {box.left:g}, {box.top:g}, {box.right:g}, {box.bottom:g} lies outside the image of "
            f"{image.width}x{image.height} pixels; correct it, or the unit and form of boxes in the source's options",
        )
    return pixels
