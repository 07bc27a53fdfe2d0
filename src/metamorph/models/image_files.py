"""Image files of strangers: any mode, upright, first frame, and never larger than a limit."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from typing import BinaryIO

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from metamorph.flags.checks import printable
from metamorph.models.image_processing import to_rgb
from metamorph.models.unreadable import identify


MAX_IMAGE_PIXELS = 89_478_485
"""Largest picture in pixels (Pillow's own limit, 256 MiB as RGB): a small file may unpack to many gigabytes."""
FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000"),
    *(["AVIF"] if find_spec("PIL._avif") is not None else []),  # since Pillow 11.3, unless it is built without
)
"""What is read. Pillow knows more, some of which it hands to other programs (EPS to Ghostscript): not for data from
strangers."""
_QUARTER_TURNS = (5, 6, 7, 8)
"""Orientations of EXIF data that exchange width and height."""
_DECODING_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    struct.error,
    zlib.error,
    RuntimeError,  # of libavif
)
"""What Pillow's many decoders raise for broken files."""


class MediaError(ValueError):
    """A picture or video that cannot be used; `kind` is one of `metamorph.data.records.BAD_RECORD_KINDS`."""

    def __init__(self, kind: str, detail: str) -> None:
        self.kind = kind
        self.detail = printable(detail)
        super().__init__(self.detail)


def load_image(
    file: str | os.PathLike[str] | BinaryIO, *, name: str | None = None, max_pixels: int = MAX_IMAGE_PIXELS
) -> Image.Image:
    """Read an image as upright RGB.

    Palettes, CMYK, grey and 16-bit values are converted, transparent pixels become white, the orientation of EXIF
    data is applied, and of animations the first frame is taken.

    Args:
        file: Path, or an open binary file, which stays open.
        name: What messages call the file; by default its path.
        max_pixels: Largest number of pixels, checked before anything is unpacked.

    Raises:
        MediaError: If there is no such file, it is no image in one of `FORMATS`, or it has more than `max_pixels`.
    """
    with _opened(file, name, max_pixels) as image:
        image.load()
        with suppress(*_DECODING_ERRORS):  # EXIF data may be damaged in good images
            ImageOps.exif_transpose(image, in_place=True)
        return to_rgb(image)


def read_size(file: str | os.PathLike[str] | BinaryIO, *, name: str | None = None) -> tuple[int, int]:
    """Width and height of an image when it is upright; only its header is read.

    Args:
        file: As for [`load_image`].
        name: As for [`load_image`].

    Raises:
        MediaError: As [`load_image`].
    """
    with _opened(file, name, MAX_IMAGE_PIXELS) as image:
        turned = False
        if image.format != "TIFF":  # whose size is that of the upright image already
            with suppress(*_DECODING_ERRORS):
                turned = image.getexif().get(ExifTags.Base.Orientation) in _QUARTER_TURNS
        return (image.height, image.width) if turned else image.size


@contextmanager
def _opened(file: str | os.PathLike[str] | BinaryIO, name: str | None, max_pixels: int) -> Iterator[Image.Image]:
    """An image whose header is read; whatever is wrong with it becomes a [`MediaError`]."""
    name = str(file) if name is None else name
    if isinstance(file, (str, os.PathLike)):
        check_regular(file, "unreadable_image", f"{name} cannot be read as an image")
    try:
        with Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise MediaError(
                    "image_too_large",
                    f"{name} has {image.width}x{image.height} pixels, more than the limit of {max_pixels}; resize it",
                )
            yield image
    except MediaError:
        raise
    except FileNotFoundError as error:
        raise MediaError("missing_image", f"there is no image file {name}; is the image folder right?") from error
    except Image.DecompressionBombError as error:
        raise MediaError(
            "image_too_large", f"{name} has more pixels than Pillow allows ({error}); resize it"
        ) from error
    except _DECODING_ERRORS as error:
        # Pillow names the object that it reads from, which for an open file says nothing to a user.
        reason, mend = identify(file, FORMATS) if isinstance(error, UnidentifiedImageError) else (error, "replace it")
        raise MediaError("unreadable_image", f"{name} cannot be read as an image ({reason}); {mend}") from error


def check_regular(path: str | os.PathLike[str], kind: str, problem: str) -> None:
    """Refuse folders, pipes and devices before they are opened, which may wait for ever.

    Args:
        path: Path of a file; it need not exist.
        kind: Kind of the error.
        problem: Begin of its message.

    Raises:
        MediaError: If there is something else than a file.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise MediaError(kind, f"{problem} (it is not a regular file); replace it")
