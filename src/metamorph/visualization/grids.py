"""Images in rows and columns, as one image."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont


HEADER_HEIGHT = 22
_GAP_COLOUR = (208, 215, 222)
_MIN_LABEL_SIDE = 64
"""Pixels of a column that has room for a label."""


def image_grid(
    rows: Sequence[Sequence[Image.Image]], *, side: int, labels: Sequence[str] = (), gap: int = 0
) -> Image.Image:
    """Paste images into a grid of cells of `side` pixels, with `gap` grey pixels between them.

    Smaller images are enlarged without smoothing. `labels` are written above the columns, unless these are narrower
    than 64 pixels.
    """
    if not rows or not rows[0]:
        raise ValueError("a grid needs a row with an image")
    columns = len(rows[0])
    if lengths := {len(row) for row in rows} - {columns}:
        raise ValueError(f"rows of a grid have {columns} images, but one has {lengths.pop()}")
    if labels and len(labels) != columns:
        raise ValueError(f"{len(labels)} labels for {columns} columns")
    top = HEADER_HEIGHT if labels and side >= _MIN_LABEL_SIDE else 0
    step = side + gap
    grid = Image.new("RGB", (columns * step - gap, top + len(rows) * step - gap), _GAP_COLOUR)
    grid.paste("white", (0, 0, grid.width, top))
    for number, row in enumerate(rows):
        for column, image in enumerate(row):
            resample = Image.Resampling.NEAREST if image.width < side else Image.Resampling.BICUBIC
            grid.paste(image.resize((side, side), resample), (column * step, top + number * step))
    if top:
        pen, font = ImageDraw.Draw(grid), ImageFont.load_default(size=12)
        for column, label in enumerate(labels):
            pen.text((column * step + side / 2, top / 2), label, fill="black", font=font, anchor="mm")
    return grid


def reconstruction_grid(
    originals: Sequence[Image.Image],
    drawn: Sequence[Image.Image],
    guidance_scales: Sequence[float],
    *,
    side: int,
    gap: int = 0,
) -> Image.Image:
    """One row per square original, followed by its drawing at each guidance scale; `drawn` is in that order, too."""
    count = len(guidance_scales)
    rows = [[original, *drawn[row * count : (row + 1) * count]] for row, original in enumerate(originals)]
    labels = ["original", *(f"scale {scale:g}" for scale in guidance_scales)]
    return image_grid(rows, side=side, labels=labels, gap=gap)
