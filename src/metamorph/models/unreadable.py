"""Why a file cannot be read as an image, and what to do about it."""

import os
import re
import struct
from collections.abc import Collection
from contextlib import suppress
from typing import BinaryIO

from PIL import Image


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


def identify(file: str | os.PathLike[str] | BinaryIO, readable: Collection[str]) -> tuple[str, str]:
    """Tell from the first bytes of a file why it cannot be read as an image, and how to fix that.

    `file` is a path or an open, seekable binary file; `readable` has Pillow's names of the formats that are read.
    """
    if isinstance(file, (str, os.PathLike)):
        with open(file, "rb") as opened:
            start = opened.read(_START)
    else:
        file.seek(0)
        start = file.read(_START)
    for begin, reason, mend in _KINDS:
        if re.match(begin, start, re.DOTALL):
            return reason, mend
    if start[4:12] in (b"ftypavif", b"ftypavis") and "AVIF" not in readable:
        return "this Pillow is built without AVIF", "install Pillow 11.3 or later, or convert it to PNG"
    Image.init()
    # A format's test reads only these bytes; formats are never opened to identify a file.
    for name, (_, accepts) in Image.OPEN.items():
        is_of_format = False
        with suppress(IndexError, TypeError, ValueError, struct.error):  # of a start that is too short
            is_of_format = accepts is not None and accepts(start) is True
        if is_of_format:
            if name in readable:
                return f"its {name} header is damaged", "replace it"
            return f"the format {_SAME_START.get(name, name)} is not supported", "save it as PNG or JPEG"
    return "its content is not an image", "replace it"
