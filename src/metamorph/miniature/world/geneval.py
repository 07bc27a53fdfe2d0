"""Scenes in the format of GenEval's prompts: what its six tasks can say of them.

GenEval's rules name classes (here shapes), numbers, colours and the relative places of two objects. They cannot say how
large an object is, in which corner it lies, or that two objects of one shape differ in colour.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from metamorph.miniature.world.detector import UNREADABLE
from metamorph.miniature.world.language import drawing_prompt
from metamorph.miniature.world.render import CENTERS
from metamorph.miniature.world.scenes import SHAPES, Scene, SceneObject, sample_scene


PROMPTS_PER_TASK = 20
"""Of the shipped prompts."""
_NUM_OBJECTS = {"single_object": 1, "two_object": 2, "counting": 2, "colors": 1, "position": 2, "color_attr": 2}
"""Of the scenes of each task."""


def world_prompts(seed: int = 0) -> Iterator[dict[str, Any]]:
    """The lines of `specs/world-geneval.jsonl`: unseen scenes, each with what its task asks of the image.

    The prompts are those of `metamorph evaluate world`: they say everything about the scene, and the task says which
    part of it is judged.
    """
    for task, num_objects in _NUM_OBJECTS.items():
        for index in range(PROMPTS_PER_TASK):
            rng = np.random.default_rng([seed, *task.encode(), index])
            while True:
                scene = sample_scene(rng, num_objects=num_objects, allow_held_out=False, reserved=True)
                are_alike = len({item.shape for item in scene.objects}) < num_objects
                if are_alike == (task == "counting"):
                    break
            yield {"tag": task, **_clauses(scene, task), "prompt": drawing_prompt(scene, rng)}


def full_record(scene: Scene, *, position: bool = False) -> dict[str, Any] | None:
    """Everything that GenEval can say of a scene: exactly these shapes in these colours and, if asked for, places.

    None if it cannot tell the objects apart: two of one shape in different colours.
    """
    objects = scene.objects
    if len({item.shape for item in objects}) == len(objects):
        record = _clauses(scene, "position" if position and len(objects) == 2 else "color_attr", colors=True)
    elif len({item.color for item in objects}) == 1:
        record = {"include": [{"class": objects[0].shape, "count": 2, "color": objects[0].color}]}
    else:
        return None
    counts = Counter(item.shape for item in objects)
    exclude = [{"class": shape, "count": counts[shape] + 1} for shape in (*SHAPES, UNREADABLE)]
    return {"tag": "color_attr", **record, "exclude": exclude, "prompt": ""}


def _clauses(scene: Scene, task: str, *, colors: bool = False) -> dict[str, Any]:
    """`include` and `exclude` of a task, in GenEval's order: the object whose place is judged comes second."""
    objects = scene.objects
    if task == "counting":
        shape, count = objects[0].shape, len(objects)
        return {"include": [{"class": shape, "count": count}], "exclude": [{"class": shape, "count": count + 1}]}
    include: list[dict[str, Any]] = [{"class": item.shape, "count": 1} for item in objects]
    if colors or task in ("colors", "color_attr"):
        for clause, item in zip(include, objects, strict=True):
            clause["color"] = item.color
    if task == "position":
        include[1]["position"] = [_relation(objects[1], objects[0]), 0]
    return {"include": include}


def _relation(item: SceneObject, other: SceneObject) -> str:
    """Where `item` is, seen from `other`; of two true relations the horizontal one."""
    (x, y), (other_x, other_y) = CENTERS[item.position], CENTERS[other.position]
    if x != other_x:
        return "left of" if x < other_x else "right of"
    return "above" if y < other_y else "below"
