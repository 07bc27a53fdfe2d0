"""Images of records: where their paths lead, and boxes drawn into them."""

from __future__ import annotations

import os
import re
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from metamorph.models.image_files import MediaError


_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_MAX_PATH = 4096
"""Bytes of the longest path that Linux opens."""
BOX_COLOURS = ("red", "lime", "blue", "yellow", "magenta", "cyan")
"""Colours of drawn boxes, in their order."""


def resolve_image_path(path: str, image_folder: str | os.PathLike[str]) -> Path:
    """Join a path from a record to the image folder, which relative paths may not leave.

    Raises:
        MediaError: If a relative path leaves the folder, or it is the content of a file instead of its path.
    """
    if path.startswith("data:") or len(path) > _MAX_PATH or not _is_path(path):
        raise MediaError(
            "missing_image",
            f"{path[:40]!r}… ({len(path)} characters) is not the path of a file; content cannot stand in a record: "
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
    """Draw a frame and its name into an image.

    Lines and letters grow with the image, so that they are still seen when it is resized for the vision tower.

    Args:
        image: RGB image, which is changed.
        box: Left, top, right and bottom; the right column and bottom row belong to the outside.
        name: Written above the frame where there is room, else inside it; may be empty.
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
    """Whether a file may have that name: no NUL, and no half character, which cannot be encoded."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False
