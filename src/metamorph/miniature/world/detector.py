"""The pixel checker as a detector and a classifier of colours, for GenEval's code.

The specs of `metamorph evaluate` name the classes, because evaluation knows nothing of the miniature world.
"""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from metamorph.evaluation.detectors import Detection
from metamorph.miniature.world.checker import ObjectReading, read_image
from metamorph.miniature.world.render import CENTERS, HALF_EXTENT
from metamorph.miniature.world.scenes import DEFAULT_SIZE


UNREADABLE = "object"
"""The class of what is in the image but has no shape of the world."""


class WorldDetector:
    """Finds what `read_image` finds, with a score of 1 and the box of its nominal place and size."""

    def detect(self, image: Image.Image, names: Sequence[str], threshold: float) -> list[Detection]:
        """See `metamorph.evaluation.detectors.Detector`."""
        found = [
            Detection(item.shape or UNREADABLE, 1.0, _box(item))
            for item in read_image(image).objects
            if (item.shape or UNREADABLE) in names
        ]
        return found if threshold < 1 else []


class WorldColors:
    """The colour that `read_image` finds; `unreadable` if there is none."""

    def colors_of(
        self, image: Image.Image, objects: Sequence[Detection], name: str, colors: Sequence[str]
    ) -> list[str]:
        """See `metamorph.evaluation.detectors.ColorClassifier`."""
        of_box = {_box(item): item.color or "unreadable" for item in read_image(image).objects}
        return [of_box[item.box] for item in objects]


def _box(item: ObjectReading) -> tuple[float, float, float, float]:
    x, y = CENTERS[item.position]
    half = HALF_EXTENT[item.size or DEFAULT_SIZE]
    return x - half, y - half, x + half, y + half
