"""The miniature world in one import: scenes, drawings, the checker, and everything that is said about them.

What can a scene contain?             `scenes.py`; how it changes: `changes.py`
How does it look?                     `render.py`; cell by cell of the token grid: `cells.py`
What is said about it?                `language.py`; facts beyond pictures: `knowledge.py`
Does a picture show what it should?   `checker.py`
What do the data sets hold?           `dataset.py`
"""

from __future__ import annotations

import re

from metamorph.miniature.world.changes import EDIT_TEMPLATES, NEXT_FRAME_PROMPTS, edit, next_frame
from metamorph.miniature.world.checker import Reading, Verdict, judge, read_image
from metamorph.miniature.world.dataset import WorldFiles, WorldSizes, write_dataset
from metamorph.miniature.world.knowledge import FACT_TEMPLATES, THINGS, Thing, fact, fact_questions, knowledge_prompt
from metamorph.miniature.world.language import (
    COLOUR_WORDS,
    NUMBERS,
    PLURALS,
    QUESTION_TYPES,
    TEMPLATES,
    caption,
    drawing_prompt,
    questions,
)
from metamorph.miniature.world.render import IMAGE_SIZE, PALETTE, render, render_array
from metamorph.miniature.world.scenes import (
    BACKGROUNDS,
    COLORS,
    HELD_OUT,
    POSITIONS,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    is_reserved,
    sample_scene,
    single_scenes,
)


__all__ = [
    "BACKGROUNDS",
    "COLORS",
    "HELD_OUT",
    "IMAGE_SIZE",
    "PALETTE",
    "POSITIONS",
    "QUESTION_TYPES",
    "SHAPES",
    "SIZES",
    "THINGS",
    "Reading",
    "Scene",
    "SceneObject",
    "Thing",
    "Verdict",
    "WorldFiles",
    "WorldSizes",
    "caption",
    "drawing_prompt",
    "edit",
    "fact",
    "fact_questions",
    "is_reserved",
    "judge",
    "knowledge_prompt",
    "next_frame",
    "questions",
    "read_image",
    "render",
    "render_array",
    "sample_scene",
    "single_scenes",
    "vocabulary",
    "words_of",
    "write_dataset",
]

_GRAMMAR_WORDS = ("a", "an", "the", "and", "in", "on", "object", "objects", "it", "yes", "no", "background")


def words_of(text: str) -> list[str]:
    """The words and punctuation marks of a text, image markers left out."""
    return re.findall(r"[A-Za-z]+|[.,?]", text.replace("<image>", " "))


def vocabulary() -> list[str]:
    """Every word and punctuation mark of the world's texts, sorted; capitalised where a sentence can begin with it."""
    templates = [*TEMPLATES, *FACT_TEMPLATES, *NEXT_FRAME_PROMPTS]
    templates += [template for group in EDIT_TEMPLATES.values() for template in group]
    texts = [re.sub(r"\{\w+\}", " ", template) for template in templates]
    words = {word for text in texts for word in words_of(text)}
    words |= {template.split()[0].capitalize() for template in templates if template[0].isalpha()}
    for group in (SHAPES, COLORS, SIZES, POSITIONS, BACKGROUNDS, NUMBERS, PLURALS.values(), COLOUR_WORDS):
        words |= {word for entry in group for word in words_of(entry)}
    words |= {word for thing in THINGS for word in words_of(thing.name)}
    return sorted(words | set(_GRAMMAR_WORDS) | {".", "?"})
