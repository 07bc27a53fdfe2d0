"""Images in rows and columns."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from metamorph.visualization.grids import HEADER_HEIGHT, image_grid, reconstruction_grid


def plain(color: str, side: int = 8) -> Image.Image:
    return Image.new("RGB", (side, side), color)


def test_rows_and_columns_stand_where_they_should():
    originals, drawn = [plain("red"), plain("blue")], [plain("green")] * 2 + [plain("black")] * 2
    grid = reconstruction_grid(originals, drawn, [1, 3], side=8)
    assert grid.size == (24, 16)
    assert [grid.getpixel((x, 4)) for x in (4, 12, 20)] == [(255, 0, 0), (0, 128, 0), (0, 128, 0)]
    assert [grid.getpixel((x, 12)) for x in (4, 12, 20)] == [(0, 0, 255), (0, 0, 0), (0, 0, 0)]


def test_wide_columns_have_labels_and_gaps():
    grid = image_grid([[plain("red"), plain("blue")]] * 2, side=64, labels=["original", "scale 3"], gap=2)
    assert grid.size == (130, HEADER_HEIGHT + 130)
    header = np.asarray(grid.crop((0, 0, 130, HEADER_HEIGHT)))
    assert header[:, :64].min() < 100  # ink
    assert header[:, 66:].min() < 100
    assert grid.getpixel((0, HEADER_HEIGHT)) == (255, 0, 0)
    assert grid.getpixel((66, HEADER_HEIGHT)) == (0, 0, 255)
    assert grid.getpixel((65, HEADER_HEIGHT + 10)) == grid.getpixel((10, HEADER_HEIGHT + 65))


def test_misfits_are_refused():
    with pytest.raises(ValueError, match="needs a row"):
        image_grid([], side=8)
    with pytest.raises(ValueError, match="have 2 images, but one has 1"):
        image_grid([[plain("red")] * 2, [plain("red")]], side=8)
    with pytest.raises(ValueError, match="1 labels for 2 columns"):
        image_grid([[plain("red")] * 2], side=8, labels=["one"])
