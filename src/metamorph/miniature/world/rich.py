"""The rich world: two or three objects, told apart and placed by relations, counts and long sentences.

Images are drawn and judged as in the basic world; what is said about them needs more understanding. A prompt gives the
place of few objects and relates the others to them, twins are counted ("two small red circles at the top"), and
questions ask for relations. Its new words (above, below, three, or, nothing) are not in mini-llama's vocabulary: it
reads them as bytes and has to learn what they mean from images.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from metamorph.miniature.world.language import (
    ATTRIBUTE_QUESTIONS,
    COLOUR_WORDS,
    COUNT_QUESTION,
    DRAWING_PROMPTS,
    PLURALS,
    full_phrase,
    object_phrase,
    reference,
    sentence,
    yes_no_question,
)
from metamorph.miniature.world.language import NUMBERS as FEW_NUMBERS
from metamorph.miniature.world.scenes import (
    BACKGROUNDS,
    COLORS,
    CORNERS,
    DEFAULT_BACKGROUND,
    SHAPES,
    Scene,
    SceneObject,
    is_reserved,
    pick,
    sample_object,
)


QUESTION_TYPES = ("color", "shape", "size", "position", "count", "yes_no", "relation", "neighbor")
NUMBERS = (*FEW_NUMBERS, "three")
RELATIONS = ("above", "below", "to the left of", "to the right of")
"""How an object lies to the one in the same column or row."""
HALVES = {"top": "at the top", "bottom": "at the bottom", "left": "on the left", "right": "on the right"}
"""Where the two corners with this word are."""

HALF_COUNT_QUESTION = "how many objects are {half}?"
RELATION_CHECK = "is {object} {relation} {other}?"
RELATION_QUESTIONS = {
    "above": "is {object} above or below {other}?",
    "below": "is {object} above or below {other}?",
    "to the left of": "is {object} to the left or to the right of {other}?",
    "to the right of": "is {object} to the left or to the right of {other}?",
}
NEIGHBOR_QUESTION = "what is {relation} {other}?"
NOTHING = "nothing"

_TWIN_SHARE = 0.3
"""Share of scenes whose first two objects differ in their position only."""
_TRIPLET_SHARE = 0.3
"""Share of twins among three objects that become triplets."""
_TOLD_TOGETHER = 0.7
_RELATED = 0.75
"""Share of objects in prompts that are placed by a relation, if one can be."""
_IT = 0.4


def sample_rich_scene(
    rng: np.random.Generator,
    *,
    num_objects: int | None = None,
    pair_fraction: float = 0.35,
    background: str | None = None,
    allow_held_out: bool = True,
    reserved: bool | None = False,
) -> Scene:
    """Sample a scene of two objects, in a share of `pair_fraction`, or three; otherwise like `sample_scene`."""
    count = num_objects if num_objects is not None else (2 if rng.random() < pair_fraction else 3)
    while True:
        corners = [CORNERS[i] for i in rng.permutation(len(CORNERS))[:count]]
        objects = [sample_object(rng, (corner,)) for corner in corners]
        if rng.random() < _TWIN_SHARE:
            twins = count if rng.random() < _TRIPLET_SHARE else 2
            objects[:twins] = [replace(objects[0], position=corner) for corner in corners[:twins]]
        scene = Scene(tuple(objects), pick(rng, BACKGROUNDS) if background is None else background)
        if (allow_held_out or not scene.has_held_out) and reserved in (None, is_reserved(scene)):
            return scene


def relation(item: SceneObject, other: SceneObject) -> str | None:
    """Which of `RELATIONS` `item` has to `other`; None in opposite corners, of which nothing is said."""
    (row, column), (other_row, other_column) = item.position.split(), other.position.split()
    if column == other_column:
        return "above" if row == "top" else "below"
    if row == other_row:
        return "to the left of" if column == "left" else "to the right of"
    return None


def rich_drawing_prompt(scene: Scene, rng: np.random.Generator) -> str:
    """A request to draw this scene, complete but for the default background, with relations and counts."""
    phrases, told = _counted(scene, rng)
    for index in rng.permutation(len(scene.objects)):
        item = scene.objects[index]
        if item not in told:
            phrases.append(_placed(item, told, rng))
            told.append(item)
    text = " and ".join(filter(None, (", ".join(phrases[:-1]), phrases[-1])))
    if scene.background != DEFAULT_BACKGROUND or rng.random() < 0.25:
        text += f" on a {scene.background} background"
    return sentence(pick(rng, DRAWING_PROMPTS), rng, scene=text)


def _counted(scene: Scene, rng: np.random.Generator) -> tuple[list[str], list[SceneObject]]:
    """A phrase for twins or triplets and these objects; often none, and at most one."""
    for item in scene.objects:
        twins = [other for other in scene.objects if _look(other) == _look(item)]
        if len(twins) == 1 or rng.random() >= _TOLD_TOGETHER:
            continue
        things = f"{NUMBERS[len(twins)]} {item.size} {item.color} {PLURALS[item.shape]}"
        if len(twins) == 3:
            (free,) = set(CORNERS) - {other.position for other in twins}
            return [f"{things} with {NOTHING} in the {free}"], twins
        halves = [half for half in HALVES if all(half in other.position.split() for other in twins)]
        if halves:
            return [f"{things} {HALVES[halves[0]]}"], twins
    return [], []


def _placed(item: SceneObject, told: list[SceneObject], rng: np.random.Generator) -> str:
    """An object with all its attributes, placed by its relation to something told before or by its position."""
    anchors = [other for other in _distinct(told) if relation(item, other)]
    if not anchors or rng.random() >= _RELATED:
        return full_phrase(item)
    anchor = pick(rng, anchors)
    is_it = len(told) == 1 and rng.random() < _IT
    name = "it" if is_it else reference(Scene(tuple(told)), anchor, rng, hidden="position")
    return f"{object_phrase(size=item.size, color=item.color, shape=item.shape)} {relation(item, anchor)} {name}"


def rich_questions(scene: Scene, rng: np.random.Generator) -> list[tuple[str, str, str]]:
    """One (type, question, answer) of every type of `QUESTION_TYPES` with an unambiguous question about the scene."""
    found = []
    distinct = _distinct(scene.objects)
    related = [(item, other) for item in distinct for other in distinct if item != other and relation(item, other)]
    for kind in QUESTION_TYPES:
        turn: tuple[str, str] | None
        if kind == "count":
            turn = _count_question(scene, rng)
        elif kind == "yes_no":
            turn = _relation_check(scene, related, rng) if related and rng.random() < 0.5 else _check(scene, rng)
        elif kind == "relation":
            turn = _relation_question(scene, related, rng) if related else None
        elif kind == "neighbor":
            turn = _neighbor_question(scene, pick(rng, distinct), rng) if distinct else None
        else:
            turn = _attribute_question(scene, kind, rng)
        if turn is not None:
            found.append((kind, *turn))
    return found


def _attribute_question(scene: Scene, kind: str, rng: np.random.Generator) -> tuple[str, str] | None:
    """A question about an object, often named by its relation to another one; None for the position of a twin."""
    item = pick(rng, scene.objects)
    anchors = [other for other in _distinct(scene.objects) if other != item and relation(item, other)]
    if anchors and rng.random() < 0.5:
        anchor = pick(rng, anchors)
        named = f"the object {relation(item, anchor)} {reference(scene, anchor, rng, hidden='position')}"
    elif kind == "position" and item not in _distinct(scene.objects):
        return None
    else:
        named = reference(scene, item, rng, hidden=kind)
    words = {"object": named, "colour": pick(rng, COLOUR_WORDS)}
    return sentence(ATTRIBUTE_QUESTIONS[kind], rng, **words), getattr(item, kind)


def _count_question(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    kind = int(rng.integers(4))
    item = pick(rng, scene.objects)
    # Mostly what is there: for a uniform colour or shape the answer would nearly always be "zero".
    is_there = rng.random() < 0.7
    if kind == 0:
        things, count = "objects", len(scene.objects)
    elif kind == 1:
        color = item.color if is_there else pick(rng, COLORS)
        things, count = f"{color} objects", sum(other.color == color for other in scene.objects)
    elif kind == 2:
        shape = item.shape if is_there else pick(rng, SHAPES)
        things, count = PLURALS[shape], sum(other.shape == shape for other in scene.objects)
    else:
        half = pick(rng, tuple(HALVES))
        count = sum(half in other.position.split() for other in scene.objects)
        return sentence(HALF_COUNT_QUESTION, rng, half=HALVES[half]), NUMBERS[count]
    return sentence(COUNT_QUESTION, rng, things=things), NUMBERS[count]


def _check(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    return yes_no_question(scene, pick(rng, scene.objects), rng)


def _relation_check(
    scene: Scene, related: list[tuple[SceneObject, SceneObject]], rng: np.random.Generator
) -> tuple[str, str]:
    """A question whose answer is "yes" half of the time."""
    item, other = pick(rng, related)
    true, right = relation(item, other), bool(rng.random() < 0.5)
    claimed = true if right else pick(rng, tuple(name for name in RELATIONS if name != true))
    words = {"object": _named(scene, item, rng), "other": _named(scene, other, rng)}
    return sentence(RELATION_CHECK, rng, relation=str(claimed), **words), "yes" if right else "no"


def _relation_question(
    scene: Scene, related: list[tuple[SceneObject, SceneObject]], rng: np.random.Generator
) -> tuple[str, str]:
    item, other = pick(rng, related)
    true = str(relation(item, other))
    words = {"object": _named(scene, item, rng), "other": _named(scene, other, rng)}
    return sentence(RELATION_QUESTIONS[true], rng, **words), true.removeprefix("to the ").removesuffix(" of")


def _neighbor_question(scene: Scene, other: SceneObject, rng: np.random.Generator) -> tuple[str, str]:
    """What is in the same row or column as `other`: an object with its size and colour, or nothing."""
    row, column = other.position.split()
    if rng.random() < 0.5:
        asked, place = ("below", f"bottom {column}") if row == "top" else ("above", f"top {column}")
    else:
        asked, place = ("to the right of", f"{row} right") if column == "left" else ("to the left of", f"{row} left")
    found = [item for item in scene.objects if item.position == place]
    answer = object_phrase(**{**vars(found[0]), "position": None}) if found else NOTHING
    return sentence(NEIGHBOR_QUESTION, rng, relation=asked, other=_named(scene, other, rng)), answer


def _named(scene: Scene, item: SceneObject, rng: np.random.Generator) -> str:
    """A phrase that fits only this object, which must have no twin, without its position."""
    return reference(scene, item, rng, hidden="position")


def _distinct(objects: list[SceneObject] | tuple[SceneObject, ...]) -> list[SceneObject]:
    """The objects that can be named without their position, since no other looks like them."""
    looks = [_look(item) for item in objects]
    return [item for item in objects if looks.count(_look(item)) == 1]


def _look(item: SceneObject) -> tuple[str, str, str]:
    return item.size, item.color, item.shape
