"""The language of the miniature world: captions, questions and prompts from a small closed grammar.

Most sentences begin with a capital; answers are lower case without a full stop.
"""

from __future__ import annotations

import numpy as np

from metamorph.miniature.world.scenes import (
    COLORS,
    DEFAULT_BACKGROUND,
    DEFAULT_POSITION,
    DEFAULT_SIZE,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    pick,
)


QUESTION_TYPES = ("color", "shape", "size", "position", "count", "yes_no")
COLOUR_WORDS = ("colour", "colour", "color")
"""Both spellings, the British one twice as often."""
NUMBERS = ("zero", "one", "two")
PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}

CAPTIONS = ("{scene} on a {background} background", "there is {scene} on a {background} background")
CAPTION_REQUESTS = ("describe the image", "what is in the image?", "what do you see?")
ATTRIBUTE_QUESTIONS = {
    "color": "what {colour} is {object}?",
    "shape": "what shape is {object}?",
    "size": "what size is {object}?",
    "position": "where is {object}?",
}
COUNT_QUESTION = "how many {things} are there?"
EXISTENCE_QUESTION = "is there {object}?"
PROPERTY_QUESTION = "is {object} {property}?"
DRAWING_PROMPTS = ("generate an image of {scene}", "draw {scene}", "show me a picture of {scene}")

_CAPITAL_SHARE = 0.7
_STOP_SHARE = 0.3


def sentence(template: str, rng: np.random.Generator, **words: str) -> str:
    """Fill a template, mostly with a capital and sometimes with a full stop (unless it is a question)."""
    text = template.format(**words)
    if rng.random() < _CAPITAL_SHARE:
        text = text[0].upper() + text[1:]
    if not text.endswith("?") and rng.random() < _STOP_SHARE:
        text += "."
    return text


def with_article(noun: str) -> str:
    """The noun with "a" or "an"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def object_phrase(
    *, size: str | None = None, color: str | None = None, shape: str | None = None, position: str | None = None
) -> str:
    """Attributes in words, for example "a small red circle in the top left"."""
    phrase = with_article(" ".join(filter(None, (size, color, shape or "object"))))
    return f"{phrase} in the {position}" if position else phrase


def full_phrase(item: SceneObject) -> str:
    """An object with all its attributes."""
    return object_phrase(**vars(item))


def scene_phrase(scene: Scene, rng: np.random.Generator) -> str:
    """All objects with all attributes, in random order, without the background."""
    return " and ".join(full_phrase(scene.objects[i]) for i in rng.permutation(len(scene.objects)))


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """A complete description: every attribute of every object, and the background."""
    return pick(rng, CAPTIONS).format(scene=scene_phrase(scene, rng), background=scene.background)


def drawing_prompt(scene: Scene, rng: np.random.Generator) -> str:
    """A request to draw this scene, in which default values (large, in the centre, on white) are often omitted."""
    phrases = []
    for i in rng.permutation(len(scene.objects)):
        item = scene.objects[i]
        size = None if item.size == DEFAULT_SIZE and rng.random() < 0.5 else item.size
        position = None if item.position == DEFAULT_POSITION and rng.random() < 0.5 else item.position
        phrases.append(object_phrase(size=size, color=item.color, shape=item.shape, position=position))
    text = " and ".join(phrases)
    if scene.background != DEFAULT_BACKGROUND or rng.random() < 0.25:
        text += f" on a {scene.background} background"
    return sentence(pick(rng, DRAWING_PROMPTS), rng, scene=text)


def reference(scene: Scene, item: SceneObject, rng: np.random.Generator, *, hidden: str | None = None) -> str:
    """A phrase that fits only this object of the scene: "the red circle", "the object in the top left".

    `hidden` is an attribute that must not be mentioned because it is asked for.
    """
    while True:
        named = {
            name: getattr(item, name)
            for name, share in (("size", 0.2), ("color", 0.4), ("shape", 0.6), ("position", 0.25))
            if name != hidden and rng.random() < share
        }
        rivals = [other for other in scene.objects if other != item and named.items() <= vars(other).items()]
        if not rivals:
            return "the " + object_phrase(**named).split(" ", 1)[1]


def questions(scene: Scene, rng: np.random.Generator) -> list[tuple[str, str, str]]:
    """One (type, question, answer) of every type of `QUESTION_TYPES` with an unambiguous question about the scene."""
    found = []
    are_twins = len({(item.shape, item.color, item.size) for item in scene.objects}) < len(scene.objects)
    for kind in QUESTION_TYPES:
        item = pick(rng, scene.objects)
        if kind == "count":
            question, answer = _count_question(scene, rng)
        elif kind == "yes_no":
            question, answer = yes_no_question(scene, item, rng)
        elif kind == "position" and are_twins:
            continue
        else:
            words = {"object": reference(scene, item, rng, hidden=kind), "colour": pick(rng, COLOUR_WORDS)}
            question, answer = sentence(ATTRIBUTE_QUESTIONS[kind], rng, **words), getattr(item, kind)
        found.append((kind, question, answer))
    return found


def _count_question(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    kind = int(rng.integers(3))
    if kind == 0:
        things, count = "objects", len(scene.objects)
    elif kind == 1:
        # Mostly a colour that is there: for a uniform one the answer would nearly always be "zero".
        color = pick(rng, scene.objects).color if rng.random() < 0.6 else pick(rng, COLORS)
        things, count = f"{color} objects", sum(item.color == color for item in scene.objects)
    else:
        shape = pick(rng, scene.objects).shape if rng.random() < 0.6 else pick(rng, SHAPES)
        things, count = PLURALS[shape], sum(item.shape == shape for item in scene.objects)
    return sentence(COUNT_QUESTION, rng, things=things), NUMBERS[count]


def yes_no_question(scene: Scene, item: SceneObject, rng: np.random.Generator) -> tuple[str, str]:
    """A question whose answer is "yes" half of the time."""
    right = bool(rng.random() < 0.5)
    if rng.random() < 0.5:
        while True:
            shape = item.shape if right or rng.random() < 0.4 else pick(rng, SHAPES)
            color = item.color if right or rng.random() < 0.4 else pick(rng, COLORS)
            there = any((other.color, other.shape) == (color, shape) for other in scene.objects)
            if there == right:
                break
        question = sentence(EXISTENCE_QUESTION, rng, object=object_phrase(color=color, shape=shape))
        return question, "yes" if right else "no"
    name, values = pick(rng, (("color", COLORS), ("shape", SHAPES), ("size", SIZES)))
    value = getattr(item, name)
    shown = value if right else pick(rng, tuple(other for other in values if other != value))
    about = reference(scene, item, rng, hidden=name)
    asked = with_article(shown) if name == "shape" else shown
    return sentence(PROPERTY_QUESTION, rng, object=about, property=asked), "yes" if right else "no"
