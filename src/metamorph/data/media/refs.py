"""References to images: a file, a frame of a video, or a box within either."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Box:
    """A rectangle in an upright image."""

    left: float
    top: float
    right: float
    bottom: float
    relative: bool = False
    """Whether the sides are shares of width and height (0 to 1) instead of pixels."""
    from_size: bool = field(default=False, compare=False)
    """Whether right and bottom were computed from a width and a height; only the data check reads it."""

    @property
    def numbers(self) -> tuple[float, float, float, float, bool]:
        """The values that identify a box."""
        return (self.left, self.top, self.right, self.bottom, self.relative)

    def grown(self, margin: float) -> Box:
        """The box with `margin` times its width and height added on each side."""
        x, y = margin * (self.right - self.left), margin * (self.bottom - self.top)
        return replace(self, left=self.left - x, top=self.top - y, right=self.right + x, bottom=self.bottom + y)

    def share(self, width: int, height: int) -> float:
        """The share of an image of this size that the box covers, 0 to 1."""
        x, y = (1, 1) if self.relative else (width, height)
        sides = (min(self.right / x, 1) - max(self.left / x, 0), min(self.bottom / y, 1) - max(self.top / y, 0))
        return max(sides[0], 0) * max(sides[1], 0)

    def pixels(self, width: int, height: int) -> tuple[int, int, int, int] | None:
        """Left, top, right and bottom in integer pixels, clipped to an image of this size; None if nothing is left."""
        x, y = (width, height) if self.relative else (1, 1)
        left, top = max(math.floor(self.left * x), 0), max(math.floor(self.top * y), 0)
        right, bottom = min(math.ceil(self.right * x), width), min(math.ceil(self.bottom * y), height)
        return (left, top, right, bottom) if left < right and top < bottom else None


@dataclass(frozen=True)
class ImageRef:
    """Describes an image that has not been loaded yet."""

    path: str
    """Path of an image or a video, as written in the record."""
    crop: Box | None = None
    """The part of the image to crop to; None for all of it."""
    boxes: tuple[tuple[str, Box], ...] = ()
    """Names and boxes to draw into the image, before it is cropped."""
    time: float | None = None
    """Seconds from the first frame, if `path` is a video; None for an image."""
    box: Box | None = field(default=None, compare=False)
    """The box in the record; `crop` may have a margin around it. Only the data check reads it."""
