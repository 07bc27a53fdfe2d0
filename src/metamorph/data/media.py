"""Pictures from disk: any mode, upright, first frame, and never larger than a limit."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

from PIL import Image, ImageOps

from metamorph.models.image_processing import to_rgb


MAX_IMAGE_PIXELS = 89_478_485
"""Largest image in pixels (Pillow's own limit, 256 MiB as RGB): a small file may unpack to many gigabytes."""


class MediaError(ValueError):
    """A picture that cannot be used; `kind` is one of `metamorph.data.records.BAD_RECORD_KINDS`."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind
        self.detail = detail


def resolve_image_path(path: str, image_folder: str | os.PathLike[str]) -> Path:
    """Join a path from a record to the image folder.

    Absolute paths are taken as they are. Links inside the folder may lead out of it: they are the user's own.

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


def load_image(path: str | os.PathLike[str], max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """Open an image as upright RGB.

    Palettes, CMYK, grey and 16-bit values are converted, transparent pixels become white, the orientation of EXIF
    data is applied, and of animations the first frame is taken.

    Raises:
        MediaError: If there is no such file, it is no image that Pillow can read, or it has more than `max_pixels`.
    """
    try:
        with Image.open(path) as image:
            if image.width * image.height > max_pixels:
                raise MediaError(
                    "unreadable_image",
                    f"{path} has {image.width}x{image.height} pixels, more than the limit of {max_pixels}; resize it",
                )
            return to_rgb(ImageOps.exif_transpose(image))
    except MediaError:
        raise
    except FileNotFoundError as error:
        raise MediaError("missing_image", f"there is no image file {path}; is --image_folder right?") from error
    except _DECODING_ERRORS as error:
        raise MediaError("unreadable_image", f"{path} cannot be read as an image ({error}); replace it") from error


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
    Image.DecompressionBombError,
)
"""What Pillow's many decoders raise for broken files."""
