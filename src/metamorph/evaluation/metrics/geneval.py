"""GenEval: are the objects of the prompt in the image, in the right number, colours and places?

Each verdict follows the benchmark's own rules, which docs/benchmarks.md lists with their sources.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from metamorph.evaluation.detectors import (
    ColorClassifier,
    Detection,
    Detector,
    check_colors,
    check_detector,
    load_colors,
    load_detector,
)
from metamorph.evaluation.metrics.base import Metric, Scores, Tools
from metamorph.evaluation.samples import Answer, Sample
from metamorph.models.image_files import load_image


COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
POSITIONS = ("left of", "right of", "above", "below")
MAX_OBJECTS = 16
"""Of a class, those with the highest scores."""
POSITION_MARGIN = 0.1
"""Share of the two objects' sizes by which their centres must be apart."""


@dataclass(frozen=True)
class Geneval(Metric):
    """Share of images that show what the prompt asks for; `overall` is the mean of the tasks' shares."""

    name: ClassVar[str] = "geneval"
    headline: ClassVar[str] = "overall"
    needs_images: ClassVar[bool] = True
    detector: str = "facebook/mask2former-swin-small-coco-instance"
    """Folder or Hub id of a Mask2Former, Grounding DINO or OWLv2, or `module:Class` of one's own."""
    colors: str = "openai/clip-vit-large-patch14"
    """Folder or Hub id of a CLIP or SigLIP, or `module:Class` of one's own."""
    threshold: float = 0.3
    """Scores of objects must be higher."""
    counting_threshold: float = 0.9
    """The same in the task `counting`."""

    def check(self, samples: Sequence[Sample]) -> None:
        """See `Metric.check`."""
        check_detector(self.detector, sorted({name for sample in samples for name in class_names(sample.reference)}))
        check_colors(self.colors)

    def score(self, samples: Sequence[Sample], answers: Sequence[Answer], tools: Tools) -> list[dict[str, float]]:
        """`correct`, the share of right images, and `any_correct`, whether at least one is."""
        detector = load_detector(self.detector, tools.device)
        colors = load_colors(self.colors, tools.device)
        found = []
        for sample, answer in zip(samples, answers, strict=True):
            verdicts = [self.judge(file, sample.reference, detector, colors) for file in answer.images]
            found.append({"correct": sum(verdicts) / max(len(verdicts), 1), "any_correct": float(any(verdicts))})
            tools.progress.update()
        return found

    def judge(self, file: Path, record: Mapping[str, Any], detector: Detector, colors: ColorClassifier) -> bool:
        """Whether the image in `file` shows what a line of GenEval's prompts asks for."""
        image = load_image(file)
        threshold = self.counting_threshold if record["tag"] == "counting" else self.threshold
        names = class_names(record)
        detections = [item for item in detector.detect(image, names, threshold) if item.score > threshold]
        detections.sort(key=lambda item: item.score, reverse=True)
        objects = {name: [item for item in detections if item.name == name][:MAX_OBJECTS] for name in names}
        return is_correct(image, objects, record, colors)

    def summarise(self, samples: Sequence[Sample], scores: Sequence[Scores]) -> dict[str, float]:
        """`overall`, the means of both scores, and nothing else: the tasks are categories."""
        tasks: dict[str, list[float]] = {}
        for sample, each in zip(samples, scores, strict=True):
            tasks.setdefault(sample.categories["task"], []).append(each["correct"])
        overall = sum(sum(task) / len(task) for task in tasks.values()) / max(len(tasks), 1)
        return {"overall": overall, **super().summarise(samples, scores)}


def class_names(record: Mapping[str, Any]) -> list[str]:
    """The classes that a prompt includes or excludes."""
    return list(dict.fromkeys(clause["class"] for clause in (*record["include"], *record.get("exclude", ()))))


def is_correct(
    image: Image.Image, objects: Mapping[str, Sequence[Detection]], record: Mapping[str, Any], colors: ColorClassifier
) -> bool:
    """Whether all of `include` and none of `exclude` is in an image with these objects, best first.

    Colours and places are those of the objects with the highest scores, as many as the prompt asks for.
    """
    groups: list[Sequence[Detection]] = []
    for clause in record["include"]:
        group = objects[clause["class"]][: clause["count"]]
        if len(group) < clause["count"]:
            return False
        if "color" in clause:
            named = colors.colors_of(image, group, clause["class"], COLORS)
            if named.count(clause["color"]) < clause["count"]:
                return False
        if "position" in clause:
            relation, target = clause["position"]
            if any(relation not in relations(item, other) for item in group for other in groups[target]):
                return False
        groups.append(group)
    return all(len(objects[clause["class"]]) < clause["count"] for clause in record.get("exclude", ()))


def relations(item: Detection, other: Detection) -> set[str]:
    """Where an object is, seen from another one: up to two of "left of", "right of", "above" and "below".

    The distance of the centres counts from `POSITION_MARGIN` of both sizes on, and only along an axis that has more
    than half of it.
    """
    distances, offsets = [], []
    for low, high in ((0, 2), (1, 3)):
        distance = (item.box[low] + item.box[high] - other.box[low] - other.box[high]) / 2
        size = abs(item.box[high] - item.box[low]) + abs(other.box[high] - other.box[low])
        distances.append(distance)
        offsets.append(math.copysign(max(abs(distance) - POSITION_MARGIN * size, 0.0), distance))
    if max(map(abs, offsets)) < 1e-3:
        return set()
    across, down = (offset / math.hypot(*distances) for offset in offsets)
    return set(compress(POSITIONS, (across < -0.5, across > 0.5, down < -0.5, down > 0.5)))
