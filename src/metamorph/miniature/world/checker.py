"""Reads a scene back from an image, pixel by pixel: the judge of everything that the miniature draws.

Nothing is learned: an object's colour is the median of its pixels; its shape, size and exact place are those of the
template with the largest overlap. A blob that fits no template well enough (diffusion models leave some noise) is read
as an object without a shape, never as the nearest one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations, product

import numpy as np
from PIL import Image, ImageFilter

from metamorph.miniature.world.render import BACKGROUND_RGB, CENTERS, HALF_EXTENT, IMAGE_SIZE, PALETTE, coverage
from metamorph.miniature.world.scenes import ATTRIBUTES, CORNERS, DEFAULT_POSITION, SHAPES, Scene, SceneObject


FOREGROUND_DISTANCE = 70.0
"""RGB distance to the background above which a pixel belongs to an object."""
COLOR_TOLERANCE = 80.0
"""RGB distance to the nearest palette entry above which a colour is unreadable."""
MIN_AREA = 40
"""Fewer foreground pixels than this in a quadrant are noise; the smallest object has 128."""
MIN_OVERLAP = 0.72
"""Soft intersection over union below which a shape is unreadable; a circle and its square have 0.79."""
SEARCH = 2
"""Templates are tried up to this many pixels from the nominal centre."""
MARGIN = 2
"""Foreground up to this many pixels outside an object's template still belongs to the object."""


@dataclass(frozen=True)
class ObjectReading:
    """An object as read; an attribute is None if it is unreadable."""

    position: str
    color: str | None
    shape: str | None
    size: str | None


@dataclass(frozen=True)
class Reading:
    """Everything read from an image."""

    objects: tuple[ObjectReading, ...]
    background: str

    @property
    def scene(self) -> Scene | None:
        """The scene, or None if an attribute is unreadable or no scene has these objects."""
        positions = [item.position for item in self.objects]
        if len(positions) not in (1, 2, 3) or (len(positions) > 1 and DEFAULT_POSITION in positions):
            return None
        if any(None in vars(item).values() for item in self.objects):
            return None
        return Scene(tuple(SceneObject(**vars(item)) for item in self.objects), self.background)


@dataclass(frozen=True)
class Verdict:
    """Which attributes of an image are right; with several objects, if they are right for all."""

    color: bool
    shape: bool
    size: bool
    position: bool
    count: bool
    """Whether the number of objects is right."""

    @property
    def all(self) -> bool:
        """Everything but the background is right."""
        return self.color and self.shape and self.size and self.position and self.count


def read_image(image: Image.Image | np.ndarray) -> Reading:
    """Read a 64×64 RGB image, or a `[64, 64, 3]` uint8 array."""
    if isinstance(image, Image.Image):
        image = image.convert("RGB")
    pixels = np.asarray(image, np.float32)
    if pixels.shape != (IMAGE_SIZE, IMAGE_SIZE, 3):
        raise ValueError(f"The checker reads {IMAGE_SIZE}×{IMAGE_SIZE} RGB images, not shape {pixels.shape}.")
    background, backdrop = _read_background(pixels)
    foreground = np.linalg.norm(pixels - backdrop, axis=-1) > FOREGROUND_DISTANCE
    found = []
    if foreground[28:36, 28:36].mean() > 0.5:
        # Objects in the corners end before the middle, one in the centre always fills it and reaches into the quadrant
        # of every corner: only what it leaves there can be another object.
        item, template = _read_object(pixels, foreground, backdrop, DEFAULT_POSITION)
        found.append(item)
        foreground = foreground & ~_grown(template > 0)
    for corner in CORNERS:
        if foreground[_window(corner)].sum() >= MIN_AREA:
            found.append(_read_object(pixels, foreground, backdrop, corner)[0])
    return Reading(tuple(found), background)


def judge(image: Image.Image | np.ndarray, scene: Scene) -> Verdict:
    """Compare an image with the scene it should show.

    Objects are matched so that the most attributes agree; a missing object has no right attribute.
    """
    found, wanted = read_image(image).objects, scene.objects
    best = dict.fromkeys(ATTRIBUTES, 0)  # number of objects for which each attribute is right
    for order in permutations(found, len(wanted)):
        pairs = list(zip(order, wanted, strict=True))
        right = {name: sum(getattr(f, name) == getattr(w, name) for f, w in pairs) for name in ATTRIBUTES}
        best = max(best, right, key=lambda counts: sum(counts.values()))
    is_right = {name: count == len(wanted) for name, count in best.items()}
    return Verdict(**is_right, count=len(found) == len(wanted))


def _read_background(pixels: np.ndarray) -> tuple[str, np.ndarray]:
    """Name and measured RGB of the background, from the border of the image, which no object reaches."""
    frame = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    measured = np.median(frame, axis=0)
    name = min(BACKGROUND_RGB, key=lambda key: float(np.linalg.norm(measured - np.asarray(BACKGROUND_RGB[key]))))
    return name, measured


def _window(position: str) -> tuple[slice, slice]:
    """(rows, columns) in which an object may lie: a quadrant, or the entire image for the centre."""
    if position == DEFAULT_POSITION:
        return slice(0, IMAGE_SIZE), slice(0, IMAGE_SIZE)
    half = IMAGE_SIZE // 2
    x, y = CENTERS[position]
    return slice(y // half * half, y // half * half + half), slice(x // half * half, x // half * half + half)


def _sharpened(amount: np.ndarray) -> np.ndarray:
    """Coverage clipped at both ends, so that faint noise does not add up to an object."""
    return np.clip((amount - 0.2) / 0.6, 0, 1)


@lru_cache(maxsize=len(CENTERS))
def _templates(position: str) -> tuple[list[tuple[str, str]], np.ndarray]:
    """(shape, size) of every template of a position, and the templates, `[templates, pixels of the window]`."""
    window = _window(position)
    x, y = CENTERS[position]
    shifts = range(-SEARCH, SEARCH + 1)
    names, masks = [], []
    for shape, size, dx, dy in product(SHAPES, HALF_EXTENT, shifts, shifts):
        names.append((shape, size))
        masks.append(_sharpened(coverage(shape, size, x + dx, y + dy)[window].ravel()))
    return names, np.stack(masks)


def _grown(mask: np.ndarray) -> np.ndarray:
    """A mask and the `MARGIN` pixels around it."""
    image = Image.fromarray(mask.astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.MaxFilter(2 * MARGIN + 1))).astype(bool)


def _read_object(
    pixels: np.ndarray, foreground: np.ndarray, backdrop: np.ndarray, position: str
) -> tuple[ObjectReading, np.ndarray]:
    """The object at a position, and its best template in the shape of the position's window."""
    window = _window(position)
    patch = pixels[window].reshape(-1, 3)
    measured = np.median(patch[foreground[window].ravel()], axis=0)
    color, distance = min(
        ((name, float(np.linalg.norm(measured - np.asarray(rgb)))) for name, rgb in PALETTE.items()),
        key=lambda pair: pair[1],
    )
    # A partly covered pixel lies on the line from the background to the object's colour, in proportion to its coverage.
    direction = measured - backdrop
    amount = np.clip((patch - backdrop) @ direction / max(float(direction @ direction), 1.0), 0, 1)
    # A pixel of another colour counts as uncovered, but still in the union.
    off_line = np.linalg.norm(patch - backdrop - amount[:, None] * direction, axis=-1) > FOREGROUND_DISTANCE
    names, templates = _templates(position)
    amount = np.where(off_line, 0, _sharpened(amount))
    intersection = np.minimum(templates, amount).sum(axis=1)
    union = np.maximum(templates, np.maximum(amount, off_line)).sum(axis=1)
    overlap = intersection / union
    best = int(overlap.argmax())
    readable = overlap[best] >= MIN_OVERLAP
    reading = ObjectReading(
        position=position,
        color=color if distance <= COLOR_TOLERANCE else None,
        shape=names[best][0] if readable else None,
        size=names[best][1] if readable else None,
    )
    return reading, templates[best].reshape(foreground[window].shape)
