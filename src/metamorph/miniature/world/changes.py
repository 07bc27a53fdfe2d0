"""How scenes change: edits by instruction, and objects that move from frame to frame."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from metamorph.miniature.world.language import COLOUR_WORDS, full_phrase, reference, sentence, with_article
from metamorph.miniature.world.scenes import (
    ATTRIBUTES,
    CORNERS,
    DEFAULT_POSITION,
    Scene,
    pick,
    sample_object,
)


EDIT_KINDS = ("color", "shape", "size", "position", "add", "remove")
EDIT_TEMPLATES = {
    "color": ("change the {colour} of {object} to {value}", "make {object} {value}"),
    "shape": ("change the shape of {object} to {value}", "turn {object} into {value}"),
    "size": ("make {object} {value}", "change the size of {object} to {value}"),
    "position": ("move {object} to the {value}",),
    "add": ("add {value}",),
    "remove": ("remove {object}",),
}
NEXT_FRAME_PROMPTS = ("draw the next frame", "what comes next?", "generate the next image")
MOTION = ("top left", "top right", "bottom right", "bottom left")
"""The corners in clockwise order; a moving object visits them in this order or its reverse."""


def edit(scene: Scene, rng: np.random.Generator) -> tuple[str, str, Scene]:
    """Sample an instruction that fits a scene; returns its kind (of `EDIT_KINDS`), its text and the edited scene."""
    kinds = ["color", "shape", "size", "position"]
    if len(scene.objects) == 2:
        kinds.append("remove")
    elif scene.objects[0].position != DEFAULT_POSITION:
        kinds.append("add")
    kind = pick(rng, kinds)
    item = pick(rng, scene.objects)
    others = tuple(other for other in scene.objects if other is not item)
    is_it = len(scene.objects) == 1 and rng.random() < 0.3
    words = {"object": "it" if is_it else reference(scene, item, rng), "colour": pick(rng, COLOUR_WORDS)}
    if kind == "remove":
        changed = replace(scene, objects=others)
    elif kind == "add":
        new = sample_object(rng, tuple(corner for corner in CORNERS if corner != item.position))
        changed = replace(scene, objects=(item, new))
        words["value"] = full_phrase(new)
    else:
        value = pick(rng, _alternatives(scene, kind, getattr(item, kind)))
        changed = replace(scene, objects=(replace(item, **{kind: value}), *others))
        words["value"] = with_article(value) if kind == "shape" else value
    return kind, sentence(pick(rng, EDIT_TEMPLATES[kind]), rng, **words), changed


def next_frame(scene: Scene, rng: np.random.Generator) -> tuple[Scene, Scene, Scene]:
    """Three frames (two to see, one to draw) in which the object of a scene moves from corner to corner, either way."""
    if len(scene.objects) != 1:
        raise ValueError(f"Only a scene of one object has a next frame, not one of {len(scene.objects)}.")
    start, direction = int(rng.integers(len(MOTION))), pick(rng, (1, -1))
    first, second, third = (
        replace(scene, objects=(replace(scene.objects[0], position=MOTION[(start + direction * i) % 4]),))
        for i in range(3)
    )
    return first, second, third


def _alternatives(scene: Scene, kind: str, current: str) -> tuple[str, ...]:
    taken = {item.position for item in scene.objects} if kind == "position" else {current}
    values = CORNERS if kind == "position" and len(scene.objects) == 2 else ATTRIBUTES[kind]
    return tuple(value for value in values if value not in taken)
