"""The worlds that data sets can be written of: the basic one of the mini models, and a rich one for studies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from metamorph.miniature.world import language, rich
from metamorph.miniature.world.scenes import Scene, sample_scene


@dataclass(frozen=True)
class World:
    """Which scenes there are, and what is said about them."""

    sample: Callable[..., Scene]
    """Samples a scene; takes the arguments of `sample_scene`."""
    question_types: tuple[str, ...]
    questions: Callable[[Scene, np.random.Generator], list[tuple[str, str, str]]]
    """Questions about a scene: (type, question, answer)."""
    drawing_prompt: Callable[[Scene, np.random.Generator], str]
    held_out_objects: int | None
    """Number of objects of an evaluation scene with a held-out pair; None for any."""


BASIC = World(sample_scene, language.QUESTION_TYPES, language.questions, language.drawing_prompt, 1)
"""One or two objects, every attribute named."""
RICH = World(
    rich.sample_rich_scene, rich.QUESTION_TYPES, rich.rich_questions, rich.rich_drawing_prompt, held_out_objects=None
)
"""Two or three objects, with relations, counts and longer sentences."""
WORLDS = {"basic": BASIC, "rich": RICH}
