"""Reading image files from untrusted sources: any mode, upright, first frame, limited in size, or why not."""

import os
import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from typing import BinaryIO

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from metamorph.flags.checks import printable
from metamorph.models.image_processing import to_rgb


MAX_IMAGE_PIXELS = 89_478_485
"""Most pixels of an image (Pillow's own limit, 256 MiB as RGB): a small file may unpack to many gigabytes."""
FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000"),
    *(["AVIF"] if find_spec("PIL._avif") is not None else []),  # since Pillow 11.3, unless built without
)
"""Formats that are read. Pillow knows more, but hands some of them to other programs (EPS to Ghostscript)."""
_QUARTER_TURNS = (5, 6, 7, 8)  # EXIF orientations that swap width and height
_DECODING_ERRORS = (
    *(OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError, OverflowError),
    *(struct.error, zlib.error, RuntimeError),  # the last one from libavif
)
"""Errors of Pillow's many decoders for broken files."""
_START = 512  # bytes that identify a file
_KINDS = (
    (rb"\s*\Z", "it is empty", "download it again"),
    (rb"version https://git-lfs", "it is a pointer of Git LFS, not the file itself", "run git lfs pull"),
    (rb"(?i)\s*<(!doctype html|html)", "it is a web page", "download it again"),
    (rb"(?is).*<svg[\s>]", "it is an SVG drawing, which has no pixels", "render it to PNG"),
    (
        rb"....ftyp(hei[cxms]|hev[cxms]|mif1|msf1)",
        "it is a HEIC photograph, for which Pillow has no decoder",
        "convert it to JPEG, with the package pillow-heif for example",
    ),
    (rb"....ftyp(?!avi[fs])|\x1aE\xdf\xa3|RIFF....AVI ", "it is a video", 'name it in the field "video"'),
    (rb"\xff\x0a|\0\0\0\x0cJXL ", "it is a JPEG XL image, for which Pillow has no decoder", "convert it to PNG"),
    (rb"%PDF", "it is a PDF document", "render its pages to PNG"),
    (rb"PK\x03\x04|\x1f\x8b", "it is a compressed archive", "unpack it"),
)
"""How files of a kind begin, what they are, and what to do about it."""
_SAME_START = {"CUR": "TGA or CUR"}


class MediaError(ValueError):
    """An image or video cannot be used; `kind` is one of `metamorph.data.records.BAD_RECORD_KINDS`."""

    def __init__(self, kind: str, detail: str) -> None:
        self.kind = kind
        self.detail = printable(detail)
        super().__init__(self.detail)


def load_image(
    file: str | os.PathLike[str] | BinaryIO, *, name: str | None = None, max_pixels: int = MAX_IMAGE_PIXELS
) -> Image.Image:
    """Read an image from a path, or from an open binary file that stays open, as upright RGB.

    Transparent pixels become white, and only the first frame of an animation is read. More than `max_pixels` are
    refused before anything is unpacked, by a [`MediaError`] that calls the file `name`.
    """
    with _opened(file, name, max_pixels) as image:
        image.load()
        with suppress(*_DECODING_ERRORS):  # EXIF data may be damaged in good images
            ImageOps.exif_transpose(image, in_place=True)
        return to_rgb(image)


def read_size(file: str | os.PathLike[str] | BinaryIO, *, name: str | None = None) -> tuple[int, int]:
    """Width and height of an upright image, from its header; arguments and errors as for [`load_image`]."""
    with _opened(file, name, MAX_IMAGE_PIXELS) as image:
        turned = False
        if image.format != "TIFF":  # Pillow reports the upright size of TIFF files already
            with suppress(*_DECODING_ERRORS):
                turned = image.getexif().get(ExifTags.Base.Orientation) in _QUARTER_TURNS
        return (image.height, image.width) if turned else image.size


@contextmanager
def _opened(file: str | os.PathLike[str] | BinaryIO, name: str | None, max_pixels: int) -> Iterator[Image.Image]:
    """An image whose header is read. Whatever is wrong with it becomes a [`MediaError`]."""
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
        # Pillow's message names the file object, which says nothing to a user.
        reason, advice = _identify(file) if isinstance(error, UnidentifiedImageError) else (error, "replace it")
        raise MediaError("unreadable_image", f"{name} cannot be read as an image ({reason}); {advice}") from error


def check_regular(path: str | os.PathLike[str], kind: str, problem: str) -> None:
    """Refuse folders, pipes and devices, which may block forever, by a [`MediaError`] that begins with `problem`."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise MediaError(kind, f"{problem} (it is not a regular file); replace it")


def _identify(file: str | os.PathLike[str] | BinaryIO) -> tuple[str, str]:
    """Tell from the first bytes of a file why it cannot be read as an image, and how to fix that."""
    if isinstance(file, (str, os.PathLike)):
        with open(file, "rb") as opened:
            start = opened.read(_START)
    else:
        file.seek(0)
        start = file.read(_START)
    for begin, reason, advice in _KINDS:
        if re.match(begin, start, re.DOTALL):
            return reason, advice
    if start[4:12] in (b"ftypavif", b"ftypavis") and "AVIF" not in FORMATS:
        return "this Pillow is built without AVIF", "install Pillow 11.3 or later, or convert it to PNG"
    Image.init()
    # A format's test reads only these bytes; formats are never opened to identify a file.
    for name, (_, accepts) in Image.OPEN.items():
        is_of_format = False
        with suppress(IndexError, TypeError, ValueError, struct.error):  # of a start that is too short
            is_of_format = accepts is not None and accepts(start) is True
        if is_of_format:
            if name in FORMATS:
                return f"its {name} header is damaged", "replace it"
            return f"the format {_SAME_START.get(name, name)} is not supported", "save it as PNG or JPEG"
    return "its content is not an image", "replace it"
