"""From a reference to a picture: where files lie, which frame or part of them is meant."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol

from PIL import Image

from metamorph.data.images import MAX_IMAGE_PIXELS, MediaError, load_image
from metamorph.data.tasks.base import ImageRef


__all__ = ["MAX_IMAGE_PIXELS", "FolderStore", "MediaError", "MediaStore", "load", "load_all", "load_image"]


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
        return self.open(path).is_file()


def resolve_image_path(path: str, image_folder: str | os.PathLike[str]) -> Path:
    """Join a path from a record to the image folder, as [`FolderStore`] does.

    Raises:
        MediaError: If a relative path leaves the folder.
    """
    if os.path.isabs(path):
        return Path(path)
    normal = os.path.normpath(path)
    if normal == os.pardir or normal.startswith(os.pardir + os.sep):
        raise MediaError(
            "outside_folder", f"the image path {path!r} leaves --image_folder {image_folder}; remove the '..'"
        )
    return Path(image_folder) / normal


def load(ref: ImageRef, store: MediaStore) -> Image.Image:
    """Read one picture as upright RGB; see [`load_all`] for the pictures of a conversation.

    Raises:
        MediaError: If there is no such file, or it cannot be read.
    """
    return load_all([ref], store)[0]


def load_all(refs: Sequence[ImageRef], store: MediaStore) -> list[Image.Image]:
    """Read the pictures of a conversation as upright RGB, in order; each file is opened once.

    Args:
        refs: The pictures.
        store: Where their files are.

    Raises:
        MediaError: If a file is missing or cannot be read.
    """
    read: dict[str, Image.Image] = {}
    pictures = []
    for ref in refs:
        if ref.path not in read:
            with opened(store, ref.path, "missing_image") as file:
                read[ref.path] = load_image(file, name=ref.path if not isinstance(file, Path) else None)
        pictures.append(read[ref.path])
    return pictures


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
