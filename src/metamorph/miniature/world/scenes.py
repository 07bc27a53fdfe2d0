"""Scenes of the miniature world: one or two coloured shapes on a light background."""

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
"""Scenes of two objects use the corners only: an object in the centre would cover part of the other."""

DEFAULT_SIZE = "large"
DEFAULT_POSITION = "center"
DEFAULT_BACKGROUND = "white"
"""What a prompt means if it does not say: "a red circle" is large, in the centre, on white."""

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
"""(colour, shape) pairs, one per colour, that never appear in an *answer* image of training data.

They do appear in input images, captions and questions: the model may see a red cross, but never learns to draw one.
"""

RESERVED_FRACTION = 5
"""One scene in this many is reserved for evaluation and is in no training image; see `is_reserved`."""


def _check(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}.")


@dataclass(frozen=True)
class SceneObject:
    """A shape with three attributes, all words of the world."""

    shape: str
    color: str
    size: str
    position: str

    def __post_init__(self) -> None:
        _check("shape", self.shape, SHAPES)
        _check("color", self.color, COLORS)
        _check("size", self.size, SIZES)
        _check("position", self.position, POSITIONS)


@dataclass(frozen=True)
class Scene:
    """One object anywhere, or two in different corners, on a background. The order of objects does not matter."""

    objects: tuple[SceneObject, ...]
    background: str = DEFAULT_BACKGROUND

    def __post_init__(self) -> None:
        _check("background", self.background, BACKGROUNDS)
        if len(self.objects) not in (1, 2):
            raise ValueError(f"A scene has one or two objects, not {len(self.objects)}.")
        places = [item.position for item in self.objects]
        if len(places) == 2 and (places[0] == places[1] or DEFAULT_POSITION in places):
            raise ValueError(f"Two objects must be in two different corners, not at {places}.")

    @property
    def has_held_out(self) -> bool:
        """Whether any object is a held-out (colour, shape) pair."""
        return any((item.color, item.shape) in HELD_OUT for item in self.objects)

    def to_dict(self) -> dict[str, object]:
        """JSON form: `{"background": str, "objects": [{"shape", "color", "size", "position"}]}`."""
        return {"background": self.background, "objects": [dict(vars(item)) for item in self.objects]}

    @classmethod
    def from_dict(cls, values: dict) -> Scene:
        """Inverse of `to_dict`."""
        return cls(tuple(SceneObject(**item) for item in values["objects"]), values["background"])


def is_reserved(scene: Scene) -> bool:
    """Whether this combination of objects, on any background, is reserved for evaluation.

    A checksum of the objects decides, so that all data sets and builds agree without a shared list.
    """
    key = "|".join(sorted(f"{o.size} {o.color} {o.shape} {o.position}" for o in scene.objects))
    return zlib.crc32(key.encode()) % RESERVED_FRACTION == 0


def single_scenes() -> Iterator[Scene]:
    """All 560 scenes of one object, in a fixed order."""
    for shape, color, size, position, background in product(SHAPES, COLORS, SIZES, POSITIONS, BACKGROUNDS):
        yield Scene((SceneObject(shape, color, size, position),), background)


def sample_object(rng: np.random.Generator, positions: tuple[str, ...] = POSITIONS) -> SceneObject:
    """Sample an object, every attribute uniformly."""
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
    """Sample a scene by rejection.

    Args:
        rng: Source of randomness.
        num_objects: 1 or 2; by default 2 with probability `pair_fraction`.
        pair_fraction: Share of scenes with two objects.
        background: By default uniform.
        allow_held_out: Whether held-out (colour, shape) pairs may appear; False for answer images.
        reserved: False for training scenes, True for evaluation scenes, None for any.
    """
    count = num_objects if num_objects is not None else (2 if rng.random() < pair_fraction else 1)
    while True:
        if count == 1:
            objects: tuple[SceneObject, ...] = (sample_object(rng),)
        else:
            first, second = (CORNERS[i] for i in rng.permutation(len(CORNERS))[:2])
            objects = (sample_object(rng, (first,)), sample_object(rng, (second,)))
        chosen = background if background is not None else BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
        scene = Scene(objects, chosen)
        if (allow_held_out or not scene.has_held_out) and reserved in (None, is_reserved(scene)):
            return scene
