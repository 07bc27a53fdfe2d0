"""Scenes of the miniature world: one to three coloured shapes on a light background."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TypeVar

import numpy as np


T = TypeVar("T")

SHAPES = ("circle", "square", "triangle", "cross")
COLORS = ("red", "green", "blue", "yellow", "orange", "purple", "black")
SIZES = ("small", "large")
POSITIONS = ("center", "top left", "top right", "bottom left", "bottom right")
BACKGROUNDS = ("white", "grey")

ATTRIBUTES = {"shape": SHAPES, "color": COLORS, "size": SIZES, "position": POSITIONS}
"""The words of each attribute of an object, in the order of `SceneObject`'s fields."""

CORNERS = POSITIONS[1:]
"""Scenes of several objects use the corners only: an object in the centre would cover part of the other."""

DEFAULT_SIZE = "large"
DEFAULT_POSITION = "center"
DEFAULT_BACKGROUND = "white"
"""What a prompt means if it does not say: "a red circle" is large, in the centre, on white."""

_HELD_OUT_SHAPES = ("cross", "circle", "triangle", "square", "triangle", "square", "circle")
HELD_OUT = frozenset(zip(COLORS, _HELD_OUT_SHAPES, strict=True))
"""(colour, shape) pairs, one per colour, that never appear in an *answer* image of training data.

They do appear in input images, captions and questions: the model may see a red cross, but never learns to draw one.
"""

RESERVED_FRACTION = 5
"""One scene in this many is reserved for evaluation and is in no training image; see `is_reserved`."""


@dataclass(frozen=True)
class SceneObject:
    """A shape with three attributes, all words of the world."""

    shape: str
    color: str
    size: str
    position: str

    def __post_init__(self) -> None:
        for name, words in ATTRIBUTES.items():
            _check(name, getattr(self, name), words)


@dataclass(frozen=True)
class Scene:
    """One object anywhere, or two or three in different corners, on a background.

    The order of objects does not matter.
    """

    objects: tuple[SceneObject, ...]
    background: str = DEFAULT_BACKGROUND

    def __post_init__(self) -> None:
        _check("background", self.background, BACKGROUNDS)
        if len(self.objects) not in (1, 2, 3):
            raise ValueError(f"A scene has one to three objects, not {len(self.objects)}.")
        places = [item.position for item in self.objects]
        if len(places) > 1 and (len(set(places)) < len(places) or DEFAULT_POSITION in places):
            raise ValueError(f"Several objects must be in different corners, not at {places}.")

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


def _check(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}.")


def is_reserved(scene: Scene) -> bool:
    """Whether this combination of objects, on any background, is reserved for evaluation.

    A checksum of the objects decides, so that all data sets and builds agree without a shared list.
    """
    key = "|".join(sorted(f"{o.size} {o.color} {o.shape} {o.position}" for o in scene.objects))
    return zlib.crc32(key.encode()) % RESERVED_FRACTION == 0


def single_scenes() -> Iterator[Scene]:
    """All 560 scenes of one object, in a fixed order."""
    for *attributes, background in product(*ATTRIBUTES.values(), BACKGROUNDS):
        yield Scene((SceneObject(*attributes),), background)


def pick(rng: np.random.Generator, choices: Sequence[T]) -> T:
    """One of `choices`, uniformly."""
    return choices[int(rng.integers(len(choices)))]


def sample_object(rng: np.random.Generator, positions: tuple[str, ...] = POSITIONS) -> SceneObject:
    """Sample an object, every attribute uniformly."""
    return SceneObject(pick(rng, SHAPES), pick(rng, COLORS), pick(rng, SIZES), pick(rng, positions))


def sample_scene(
    rng: np.random.Generator,
    *,
    num_objects: int | None = None,
    pair_fraction: float = 0.35,
    background: str | None = None,
    allow_held_out: bool = True,
    reserved: bool | None = False,
) -> Scene:
    """Sample a scene by rejection; by default one for training, with two objects in a share of `pair_fraction`.

    `allow_held_out` is False for answer images, which show no held-out (colour, shape) pair. `reserved` is True for
    evaluation scenes, None for any.
    """
    count = num_objects if num_objects is not None else (2 if rng.random() < pair_fraction else 1)
    while True:
        if count == 1:
            objects: tuple[SceneObject, ...] = (sample_object(rng),)
        else:
            objects = tuple(sample_object(rng, (CORNERS[i],)) for i in rng.permutation(len(CORNERS))[:2])
        scene = Scene(objects, pick(rng, BACKGROUNDS) if background is None else background)
        if (allow_held_out or not scene.has_held_out) and reserved in (None, is_reserved(scene)):
            return scene
