"""Which attributes of a scene each cell of the token grid shows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from metamorph.miniature.world.render import CENTERS, IMAGE_SIZE
from metamorph.miniature.world.scenes import ATTRIBUTES, Scene


GRID = 4
"""Visual tokens along each side of an image."""


def cells_of(position: str) -> list[int]:
    """Indices of the tokens that an object at `position` covers, in reading order.

    These are the 2×2 cells whose centres lie within half a cell of the object's. Small or large, an object touches
    exactly these, so no cell has two objects.
    """
    x, y = CENTERS[position]
    size = IMAGE_SIZE / GRID
    centers = [((column + 0.5) * size, (row + 0.5) * size) for row in range(GRID) for column in range(GRID)]
    return [index for index, (cx, cy) in enumerate(centers) if abs(cx - x) <= size / 2 and abs(cy - y) <= size / 2]


def cell_labels(scenes: Sequence[Scene]) -> Tensor:
    """Classes of the object in each cell, `[scenes, 16, attributes]` int64.

    Class 0 is "no object here"; class k is the (k-1)-th word of the attribute.
    """
    labels = torch.zeros(len(scenes), GRID * GRID, len(ATTRIBUTES), dtype=torch.long)
    for row, scene in enumerate(scenes):
        for item in scene.objects:
            classes = [words.index(getattr(item, name)) + 1 for name, words in ATTRIBUTES.items()]
            labels[row, cells_of(item.position)] = torch.tensor(classes)
    return labels
