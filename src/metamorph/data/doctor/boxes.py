"""Checks of boxes against the sizes of their images: units, formats, areas."""

from __future__ import annotations

from collections.abc import Sequence

from metamorph.data.media.refs import Box, ImageRef
from metamorph.data.media.stores import MediaStore, image_size


BOX_WARNINGS = {
    "box_outside": "a box reaches beyond its image, and is clipped",
    "box_format": "right and bottom of a box seem to be read as its width and height",
}
"""Problems of boxes that training accepts."""

_ROUNDING = 1.0
"""Pixels by which annotation tools may exceed the image."""


def check_boxes(images: Sequence[ImageRef], store: MediaStore) -> tuple[list[tuple[str, str]], list[float]]:
    """Compare the boxes of a conversation with the sizes of their images, from the headers of the files.

    Returns:
        Kind and detail of each problem, and the share of its image that each box covers.
    """
    found, shares = [], []
    for ref in images:
        boxes = [*([] if ref.box is None else [ref.box]), *(box for _, box in ref.boxes)]
        if not boxes or ref.time is not None:
            continue
        width, height = image_size(ref.path, store)
        for box in boxes:
            shares.append(box.share(width, height))
            if (fault := _fault(box, width, height)) is not None:
                found.append((fault[0], f"{ref.path} ({width}x{height} pixels): {fault[1]}"))
    return found, shares


def _fault(box: Box, width: int, height: int) -> tuple[str, str] | None:
    x, y = (width, height) if box.relative else (1, 1)
    left, top, right, bottom = box.left * x, box.top * y, box.right * x, box.bottom * y
    if min(left, top) >= -_ROUNDING and right <= width + _ROUNDING and bottom <= height + _ROUNDING:
        return None
    numbers = f"the box {box.left:g}, {box.top:g}, {box.right:g}, {box.bottom:g} (left, top, right, bottom)"
    third, fourth = right - left, bottom - top  # as the record has them, if it gives width and height
    if box.from_size and 0 <= left < third <= width + _ROUNDING and 0 <= top < fourth <= height + _ROUNDING:
        return (
            "box_format",
            f"{numbers} reaches beyond the image, but would fit if its last two numbers were right and bottom; "
            "set box_format: xyxy in the source's options if they are",
        )
    return (
        "box_outside",
        f"{numbers} reaches beyond the image and is clipped; correct it, or box_units, or the size of the image: boxes "
        "are in pixels of the upright image as the file is now",
    )
