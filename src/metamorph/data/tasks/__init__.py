"""Data tasks: each turns a record into a conversation. The task of a source is declared, never guessed.

To add one: write a module with a frozen dataclass of options and a function `build(record, rng, options, video)` that
returns a `Conversation` (`instruction.py` is the shortest), name both in a `Task`, and add that to `_ALL` below.
Wordings belong in `wording.py`; shared code is in `base.py`. The tasks: `instruction.py`, `images.py` (drawing and
editing), `regions.py` (a detail first), `video_qa.py`, `frame_prediction.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Any

from metamorph.data.media.refs import Box, ImageRef
from metamorph.data.tasks.base import Conversation, Task
from metamorph.data.tasks.frame_prediction import FRAME_PREDICTION
from metamorph.data.tasks.images import IMAGE_EDIT, TEXT_TO_IMAGE
from metamorph.data.tasks.instruction import INSTRUCTION
from metamorph.data.tasks.regions import VISUAL_COT, VSTAR
from metamorph.data.tasks.video_qa import VIDEO_QA
from metamorph.flags.parser import nearest, unknown_choice


_ALL = (INSTRUCTION, TEXT_TO_IMAGE, IMAGE_EDIT, VISUAL_COT, VSTAR, VIDEO_QA, FRAME_PREDICTION)
TASKS: Mapping[str, Task] = MappingProxyType({task.name: task for task in _ALL})
"""All tasks by name."""

__all__ = ["TASKS", "Box", "Conversation", "ImageRef", "Task", "get_task", "parse_options"]


def get_task(name: str) -> Task:
    """The task of that name; a `ValueError` lists all tasks if there is none."""
    if name not in TASKS:
        raise ValueError(f"task {unknown_choice(name, TASKS)}")
    return TASKS[name]


def parse_options(task: Task, values: Mapping[str, Any] | None = None) -> Any:
    """Create the `task.options_type` from a mapping, as in a mixture file.

    Raises:
        ValueError: If an option is unknown (the message names the nearest one), or its value is not allowed.
    """
    values = values or {}
    known = [field.name for field in fields(task.options_type)]
    for name in values:
        if name not in known:
            allowed = f"its options are {', '.join(known)}" if known else "it has none"
            near = nearest(str(name), known)
            hint = f" (did you mean {near!r}?)" if near else ""
            raise ValueError(f"task {task.name} has no option {name!r}{hint}; {allowed}")
    try:
        return task.options_type(**values)
    except ValueError as error:
        raise ValueError(f"options of task {task.name}: {error}") from error
