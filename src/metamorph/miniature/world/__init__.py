"""The miniature world: scenes of coloured shapes, how they are drawn and described, and a checker that reads images.

What can a scene contain?                    `scenes.py`; how it changes: `changes.py`
How is it drawn?                             `render.py`; what each cell of the token grid shows: `cells.py`
What is said about it?                       `language.py`; facts beyond images: `knowledge.py`
Which worlds are there?                      `worlds.py`: the basic one, and `rich.py` with relations and counts
Does an image show what it should?           `checker.py`; as a detector of GenEval's code `detector.py`
What can GenEval say of a scene?             `geneval.py`
What do the data sets contain?               `dataset.py`
"""

from __future__ import annotations

from metamorph.miniature.world.checker import judge, read_image
from metamorph.miniature.world.dataset import WorldFiles, WorldSizes, write_dataset
from metamorph.miniature.world.render import render
from metamorph.miniature.world.scenes import Scene, SceneObject, sample_scene


__all__ = [
    "Scene",
    "SceneObject",
    "WorldFiles",
    "WorldSizes",
    "judge",
    "read_image",
    "render",
    "sample_scene",
    "write_dataset",
]
