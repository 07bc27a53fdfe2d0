"""`visual_cot` and `vstar`: before the answer in words, an image of the region that it depends on."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from metamorph.data.media.refs import Box, ImageRef
from metamorph.data.media.video import VideoInfo
from metamorph.data.records import Record, Turn
from metamorph.data.tasks import wording
from metamorph.data.tasks.base import Conversation, Task, fill, pick, without_markers
from metamorph.flags.checks import check_choice
from metamorph.models.sequence.constants import DEFAULT_IMAGE_TOKEN


BOX_UNITS = ("pixels", "relative")
BOX_FORMATS = ("xyxy", "xywh")
_LARGEST = 1e9
"""Larger than any image; NaN and infinity are not below it, either."""
_LARGEST_SHARE = 2
"""A larger number cannot be a share of an image's side, however carelessly the box was drawn."""
BOX_MARK = "###"
"""Separates path and box in the data of Visual CoT."""
_ASKS_FOR_BOX = re.compile(r"[^.?!\n]*\bbounding box[^.?!\n]*[.?!]?", re.IGNORECASE)


@dataclass(frozen=True)
class BoxOptions:
    """Options of tasks with boxes."""

    box_units: str = "pixels"
    """`pixels` of the upright image, or `relative`: shares of its width and height."""
    box_format: str = "xyxy"
    """`xyxy` (left, top, right, bottom), or `xywh` (left, top, width, height)."""

    def __post_init__(self) -> None:
        check_choice("box_units", self.box_units, BOX_UNITS)
        check_choice("box_format", self.box_format, BOX_FORMATS)


@dataclass(frozen=True)
class VisualCotOptions(BoxOptions):
    """Options of `visual_cot`."""

    margin: float = 0.0
    """Share of the box's width and height that the crop shows around it on each side."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.margin, (int, float)) or not 0 <= self.margin < math.inf:
            raise ValueError(f"margin must be a number, at least 0, not {self.margin!r}")


@dataclass(frozen=True)
class VstarOptions(BoxOptions):
    """Options of `vstar`."""

    box_format: str = "xywh"
    """`xywh` (left, top, width, height), as in the V* data, or `xyxy` (left, top, right, bottom)."""
    draw_names: bool = True
    """Whether to write the name of an object at its box."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.draw_names, bool):
            raise ValueError(f"draw_names must be true or false, not {self.draw_names!r}")


def _visual_cot(
    record: Record, rng: np.random.Generator, options: VisualCotOptions, video: VideoInfo | None
) -> Conversation:
    originals = [ImageRef(path) for path in record.images if BOX_MARK not in path]
    crops = [_parse_crop(record, path, options) for path in record.images if BOX_MARK in path]
    if not originals or not crops:
        raise record.error(
            "image_count",
            f'"image" names {len(originals)} image(s) without and {len(crops)} with a box; the task visual_cot '
            f'takes at least one of each: ["a.jpg", "a.jpg{BOX_MARK}[x1, y1, x2, y2]"]',
        )
    system, question, answer = _question_and_answer(record)
    # The data may ask for coordinates in words, but here the answer shows the region.
    without_request = _ASKS_FOR_BOX.sub("", question).strip()
    if without_markers(without_request):  # else the question itself is about a box
        question = without_request
    if DEFAULT_IMAGE_TOKEN not in question:
        question = f"{DEFAULT_IMAGE_TOKEN * len(originals)}\n{question}"
    images = DEFAULT_IMAGE_TOKEN * len(crops)
    return Conversation(
        turns=(
            *system,
            Turn("user", f"{question}\n{pick(rng, wording.LOOK_CLOSER)}"),
            Turn("assistant", fill(pick(rng, wording.LOOKED_CLOSER), images=images, answer=answer)),
        ),
        images=(*originals, *crops),
    )


def _question_and_answer(record: Record) -> tuple[list[Turn], str, str]:
    """System turns, the first question and the last answer; turns between them are about the box."""
    questions = [turn.text for turn in record.turns if turn.role == "user"]
    answers = [turn.text for turn in record.turns if turn.role == "assistant"]
    if not 1 <= len(questions) <= 2 or len(answers) != len(questions) or not without_markers(answers[-1]):
        raise record.error(
            "bad_turn",
            "the task visual_cot takes a question and an answer in words, with at most one pair of turns about the box "
            f"between them, not {len(questions)} human and {len(answers)} gpt turn(s)",
        )
    system = [turn for turn in record.turns if turn.role == "system"]
    return system, questions[0].strip(), without_markers(answers[-1])


def _parse_crop(record: Record, text: str, options: VisualCotOptions) -> ImageRef:
    path, _, numbers = text.rpartition(BOX_MARK)
    numbers = numbers.strip()
    try:
        values = [float(number) for number in numbers.removeprefix("[").removesuffix("]").split(",")]
    except ValueError:
        values = []
    if not path or not (numbers.startswith("[") and numbers.endswith("]")):
        values = []
    box = _parse_box(record, values, f"{text!r}", options)
    return ImageRef(path, crop=box.grown(options.margin), box=box)


def _parse_box(record: Record, values: Any, where: str, options: BoxOptions) -> Box:
    """A box of four numbers that enclose an area and are not obviously in the other unit; errors quote `where`."""
    relative, has_size = options.box_units == "relative", options.box_format == "xywh"
    form = "[x, y, width, height], width and height above 0" if has_size else "[x1, y1, x2, y2], x1 < x2, y1 < y2"
    if (
        not isinstance(values, Sequence)
        or len(values) != 4
        or not all(isinstance(value, (int, float)) and abs(value) < _LARGEST for value in values)
    ):
        raise record.error("bad_box", f"{where} has no box of the form {form}; correct it, or the source's options")
    left, top, third, fourth = values
    right, bottom = (left + third, top + fourth) if has_size else (third, fourth)
    if not (left < right and top < bottom):
        swap = ""
        if not has_size and third > 0 and fourth > 0:
            swap = "; if its last two numbers are width and height, set box_format: xywh"
        raise record.error(
            "bad_box", f"{where} has no box of the form {form}{swap}; correct it, or the source's options"
        )
    if not relative and all(0 <= value <= 1 for value in values):
        raise record.error(
            "box_units",
            f"{where} has a box of at most one pixel: its numbers are shares of the image's sides; set box_units: "
            "relative in the source's options",
        )
    if relative and (left >= 1 or top >= 1 or max(right, bottom) > _LARGEST_SHARE):
        raise record.error(
            "box_units",
            f"{where} has a box far outside its image: its numbers are not shares of the image's sides; set "
            "box_units: pixels in the source's options, or divide them by width and height",
        )
    return Box(left, top, right, bottom, relative, from_size=has_size)


def _vstar(record: Record, rng: np.random.Generator, options: VstarOptions, video: VideoInfo | None) -> Conversation:
    if len(record.images) != 1:
        raise record.error("image_count", f'the task vstar takes one image, but "image" names {len(record.images)}')
    boxes = _parse_instances(record, options)
    turns = [Turn(turn.role, without_markers(turn.text)) for turn in record.turns]
    roles = [turn.role for turn in turns]
    if "user" not in roles or "assistant" not in roles:
        raise record.error("no_conversations", "the task vstar needs a question and an answer in the conversations")
    question, answer = roles.index("user"), roles.index("assistant")
    turns[question] = Turn("user", f"{DEFAULT_IMAGE_TOKEN}\n{turns[question].text}\n{pick(rng, wording.MARK)}")
    marked = fill(pick(rng, wording.MARKED), image=DEFAULT_IMAGE_TOKEN, answer=turns[answer].text)
    turns[answer] = Turn("assistant", marked)
    path = record.images[0]
    return Conversation(tuple(turns), (ImageRef(path), ImageRef(path, boxes=boxes)))


def _parse_instances(record: Record, options: VstarOptions) -> tuple[tuple[str, Box], ...]:
    instances = record.fields.get("target_instances")
    if not isinstance(instances, list) or not instances:
        raise record.error(
            "bad_field",
            'the task vstar needs "target_instances": a list of {"name": text, "bbox": four numbers}, not '
            f"{instances!r:.80}; records without objects belong in a source with task: instruction",
        )
    boxes = []
    for number, instance in enumerate(instances, 1):
        if not isinstance(instance, Mapping) or not isinstance(instance.get("name"), str):
            raise record.error("bad_field", f'target instance {number} has no "name": {instance!r:.80}')
        values = instance.get("bbox")
        box = _parse_box(record, values, f'"bbox" of target instance {number}: {values!r:.80}', options)
        boxes.append((instance["name"] if options.draw_names else "", box))
    return tuple(boxes)


VISUAL_COT = Task("visual_cot", VisualCotOptions, _visual_cot, draws=True)
"""A question about a region of an image: the region is shown, then the question is answered in words."""
VSTAR = Task("vstar", VstarOptions, _vstar, draws=True)
"""A question about objects in an image: it is shown with the objects marked, then answered in words."""
