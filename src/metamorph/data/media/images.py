"""Paths of images, and boxes drawn into images."""

from __future__ import annotations

import os
import re
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from metamorph.models.image_files import MediaError


_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_MAX_PATH = 4096
"""Longest path in bytes that Linux opens."""
BOX_COLOURS = ("red", "lime", "blue", "yellow", "magenta", "cyan")


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


def draw_box(image: Image.Image, box: tuple[int, int, int, int], name: str, colour: str) -> None:
    """Draw a frame and its name into an RGB image, in place.

    Lines and letters scale with the image, so that they stay visible when it is resized for the vision tower.

    Args:
        image: The image.
        box: Left, top, right and bottom; right and bottom are exclusive.
        name: Written above the frame if there is room, else inside it; may be empty.
        colour: Name of the colour.
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


def _is_path(text: str) -> bool:
    """Whether a file can have that name: no NUL, and no half character, which cannot be encoded."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False
