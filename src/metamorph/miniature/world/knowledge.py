"""Facts beyond images: the colours and shapes of a few everyday things.

Facts are taught as text only. Some things also occur in drawing prompts ("draw the colour of a leaf as a square"); the
others are drawn in no training sample, so a correct image of them shows knowledge transferred from text to images.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from metamorph.miniature.world.language import COLOUR_WORDS, object_phrase, sentence, with_article
from metamorph.miniature.world.scenes import (
    COLORS,
    DEFAULT_BACKGROUND,
    DEFAULT_POSITION,
    DEFAULT_SIZE,
    HELD_OUT,
    SHAPES,
    Scene,
    SceneObject,
    pick,
)


@dataclass(frozen=True)
class Thing:
    """An everyday thing with a colour, a shape, or both."""

    name: str
    """With its article: "grass", "the sun", "a wheel"."""
    color: str | None = None
    shape: str | None = None
    drawn: bool = True
    """Whether training prompts ask to draw it; the other things are for evaluation."""


THINGS = (
    Thing("grass", color="green", drawn=False),
    Thing("a leaf", color="green"),
    Thing("a cucumber", color="green"),
    Thing("the sky", color="blue"),
    Thing("the sea", color="blue", drawn=False),
    Thing("a blueberry", color="blue"),
    Thing("the sun", color="yellow", shape="circle"),
    Thing("a lemon", color="yellow"),
    Thing("a banana", color="yellow", drawn=False),
    Thing("blood", color="red"),
    Thing("a tomato", color="red", drawn=False),
    Thing("a strawberry", color="red"),
    Thing("a carrot", color="orange"),
    Thing("a pumpkin", color="orange", drawn=False),
    Thing("a plum", color="purple"),
    Thing("a grape", color="purple", drawn=False),
    Thing("coal", color="black"),
    Thing("the night", color="black", drawn=False),
    Thing("a wheel", shape="circle"),
    Thing("a coin", shape="circle", drawn=False),
    Thing("a window", shape="square"),
    Thing("a box", shape="square", drawn=False),
    Thing("a roof", shape="triangle"),
    Thing("a mountain", shape="triangle", drawn=False),
    Thing("a plus sign", shape="cross"),
)

COLOUR_FACT_QUESTIONS = ("what {colour} is {thing}?", "tell me the {colour} of {thing}")
SHAPE_FACT_QUESTIONS = ("what shape is {thing}?", "what shape does {thing} have?")
FACT_CHECK = "is {thing} {value}?"
FACT_REQUESTS = ("what do you know about {thing}?", "tell me about {thing}")
COLOUR_PROMPTS = ("draw the {colour} of {thing} as {shape}", "draw {shape} with the {colour} of {thing}")
SHAPE_PROMPTS = ("draw the shape of {thing} in {color}", "draw {color} with the shape of {thing}")
THING_PROMPTS = ("draw {thing}", "generate an image of {thing}")


def fact(thing: Thing) -> str:
    """The fact as a sentence: "grass is green", "the sun is a yellow circle", "a wheel is a circle"."""
    if thing.shape is None:
        return f"{thing.name} is {thing.color}"
    return f"{thing.name} is {with_article(' '.join(filter(None, (thing.color, thing.shape))))}"


def fact_questions(thing: Thing, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Questions about a thing with their answers, in random words."""
    found = [(sentence(pick(rng, FACT_REQUESTS), rng, thing=thing.name), fact(thing))]
    for value, values, templates in (
        (thing.color, COLORS, COLOUR_FACT_QUESTIONS),
        (thing.shape, SHAPES, SHAPE_FACT_QUESTIONS),
    ):
        if value is None:
            continue
        colour = pick(rng, COLOUR_WORDS)
        found.append((sentence(pick(rng, templates), rng, thing=thing.name, colour=colour), value))
        right = bool(rng.random() < 0.5)
        claimed = value if right else pick(rng, tuple(other for other in values if other != value))
        shown = claimed if values is COLORS else with_article(claimed)
        found.append((sentence(FACT_CHECK, rng, thing=thing.name, value=shown), "yes" if right else "no"))
    return found


def knowledge_prompt(
    rng: np.random.Generator, *, drawn: bool, allow_held_out: bool = False
) -> tuple[str, Scene, Thing]:
    """Sample a drawing prompt that needs a fact; returns prompt, scene (large, in the centre, on white) and thing.

    `drawn` is that of the thing; `allow_held_out` allows held-out (colour, shape) pairs.
    """
    things = tuple(thing for thing in THINGS if thing.drawn == drawn)
    while True:
        thing = pick(rng, things)
        color = thing.color or pick(rng, COLORS)
        shape = thing.shape or pick(rng, SHAPES)
        if (color, shape) in HELD_OUT and not allow_held_out:
            continue
        words = {"thing": thing.name, "colour": pick(rng, COLOUR_WORDS)}
        if thing.color and thing.shape:
            prompt = sentence(pick(rng, THING_PROMPTS), rng, **words)
        elif thing.color:
            prompt = sentence(pick(rng, COLOUR_PROMPTS), rng, shape=with_article(shape), **words)
        else:
            template = pick(rng, SHAPE_PROMPTS)
            shown = color if template is SHAPE_PROMPTS[0] else object_phrase(color=color)
            prompt = sentence(template, rng, color=shown, **words)
        item = SceneObject(shape, color, DEFAULT_SIZE, DEFAULT_POSITION)
        return prompt, Scene((item,), DEFAULT_BACKGROUND), thing
