"""What the miniature world contains: scenes of one or two coloured shapes on a light background."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np


SHAPES = ("circle", "square", "triangle", "cross")
COLORS = ("red", "green", "blue", "yellow", "orange", "purple", "black")
SIZES = ("small", "large")
POSITIONS = ("center", "top left", "top right", "bottom left", "bottom right")
BACKGROUNDS = ("white", "grey")

CORNERS = POSITIONS[1:]
"""Two-object scenes use the corners only: an object in the centre would cover part of its neighbour."""

DEFAULT_SIZE = "large"
DEFAULT_POSITION = "center"
DEFAULT_BACKGROUND = "white"
"""What a prompt means that does not say: "a red circle" is large, in the centre, on white."""

HELD_OUT: frozenset[tuple[str, str]] = frozenset(
    {
        ("red", "cross"),
        ("green", "circle"),
        ("blue", "triangle"),
        ("yellow", "square"),
        ("orange", "triangle"),
        ("purple", "square"),
        ("black", "circle"),
    }
)
"""The (colour, shape) pairs, one per colour, that never appear in an *answer* image of training data.

They do appear in input images, captions and questions: the model may see a red cross, but never learns to
draw one.
"""

RESERVED_FRACTION = 5
"""One scene in this many is kept for evaluation, in no training picture; see :func:`is_reserved`."""


def _check(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}.")


@dataclass(frozen=True)
class SceneObject:
    """One shape; all four attributes are words of the world's vocabulary."""

    shape: str
    """One of :data:`SHAPES`."""
    color: str
    """One of :data:`COLORS`."""
    size: str
    """One of :data:`SIZES`."""
    position: str
    """One of :data:`POSITIONS`."""

    def __post_init__(self) -> None:
        _check("shape", self.shape, SHAPES)
        _check("color", self.color, COLORS)
        _check("size", self.size, SIZES)
        _check("position", self.position, POSITIONS)

    @property
    def is_held_out(self) -> bool:
        """Whether this (colour, shape) pair is in :data:`HELD_OUT`."""
        return (self.color, self.shape) in HELD_OUT


@dataclass(frozen=True)
class Scene:
    """One or two objects on a background; the order of the objects has no meaning for the picture."""

    objects: tuple[SceneObject, ...]
    """One object anywhere, or two objects in different corners."""
    background: str = DEFAULT_BACKGROUND
    """One of :data:`BACKGROUNDS`."""

    def __post_init__(self) -> None:
        _check("background", self.background, BACKGROUNDS)
        if len(self.objects) not in (1, 2):
            raise ValueError(f"A scene has one or two objects, not {len(self.objects)}.")
        places = [item.position for item in self.objects]
        if len(places) == 2 and (places[0] == places[1] or DEFAULT_POSITION in places):
            raise ValueError(f"Two objects stand in two different corners, not at {places}.")

    @property
    def has_held_out(self) -> bool:
        """Whether any object is a held-out (colour, shape) pair."""
        return any(item.is_held_out for item in self.objects)

    def to_dict(self) -> dict[str, object]:
        """JSON form: ``{"background": str, "objects": [{"shape", "color", "size", "position"}]}``."""
        return {"background": self.background, "objects": [dict(vars(item)) for item in self.objects]}

    @classmethod
    def from_dict(cls, values: dict) -> Scene:
        """Inverse of :meth:`to_dict`."""
        return cls(tuple(SceneObject(**item) for item in values["objects"]), values["background"])


def is_reserved(scene: Scene) -> bool:
    """Whether this combination of objects, on any background, is kept for evaluation.

    Decided by a checksum of the objects, so that every data set and asset build agrees without a shared list.
    """
    key = "|".join(sorted(f"{o.size} {o.color} {o.shape} {o.position}" for o in scene.objects))
    return zlib.crc32(key.encode()) % RESERVED_FRACTION == 0


def single_scenes() -> Iterator[Scene]:
    """Every one-object scene, 560 of them, in a fixed order."""
    for shape, color, size, position, background in product(SHAPES, COLORS, SIZES, POSITIONS, BACKGROUNDS):
        yield Scene((SceneObject(shape, color, size, position),), background)


def sample_object(rng: np.random.Generator, positions: tuple[str, ...] = POSITIONS) -> SceneObject:
    """One object, every attribute uniform."""
    return SceneObject(
        shape=SHAPES[rng.integers(len(SHAPES))],
        color=COLORS[rng.integers(len(COLORS))],
        size=SIZES[rng.integers(len(SIZES))],
        position=positions[rng.integers(len(positions))],
    )


def sample_scene(
    rng: np.random.Generator,
    *,
    num_objects: int | None = None,
    pair_fraction: float = 0.35,
    background: str | None = None,
    allow_held_out: bool = True,
    reserved: bool | None = False,
) -> Scene:
    """Draw a scene by rejection.

    Args:
        rng: source of randomness.
        num_objects: 1 or 2; by default 2 with probability ``pair_fraction``.
        pair_fraction: share of two-object scenes when ``num_objects`` is not given.
        background: one of :data:`BACKGROUNDS`; by default uniform.
        allow_held_out: whether held-out (colour, shape) pairs may appear; ``False`` for answer images.
        reserved: ``False`` for training scenes, ``True`` for evaluation scenes, ``None`` for any.
    """
    if num_objects not in (None, 1, 2):
        raise ValueError(f"num_objects={num_objects} is not 1, 2 or None.")
    count = num_objects if num_objects is not None else (2 if rng.random() < pair_fraction else 1)
    while True:
        if count == 1:
            objects: tuple[SceneObject, ...] = (sample_object(rng),)
        else:
            first, second = (CORNERS[i] for i in rng.permutation(len(CORNERS))[:2])
            objects = (sample_object(rng, (first,)), sample_object(rng, (second,)))
        chosen = background if background is not None else BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
        scene = Scene(objects, chosen)
        if not allow_held_out and scene.has_held_out:
            continue
        if reserved is not None and is_reserved(scene) != reserved:
            continue
        return scene
