"""Generated pictures: prompt → visual tokens → pixels → verdict.

What makes a picture right is the caller's: a judge is any function from a picture and a target to named verdicts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from metamorph.evaluation.questions import answer_budget, fraction
from metamorph.inference.draw import Progress, SamplerSettings, draw
from metamorph.inference.reply import Prompt, Reply, reply_to
from metamorph.models.modeling_metamorph import MetaMorphForConditionalGeneration
from metamorph.models.processing_metamorph import MetaMorphProcessor
from metamorph.visualization.pipeline import VisualizationPipeline


Judge = Callable[[Image.Image, Any], Mapping[str, bool]]
"""From a picture and what it should show to verdicts by name, for example `{"color": True, "all": False}`."""


@dataclass(frozen=True)
class DrawingTask:
    """Something to draw."""

    prompt: Prompt
    """What the model is asked."""
    target: Any
    """What the picture should show, in the judge's terms."""


@dataclass(frozen=True)
class Drawing:
    """A task with what came of it."""

    task: DrawingTask
    """What was asked."""
    reply: Reply
    """The model's words and visual tokens."""
    picture: Image.Image | None = field(repr=False)
    """The first picture of the reply, drawn; None if the model did not draw."""
    verdict: dict[str, bool]
    """The judge's verdicts; empty without a picture."""

    def is_right(self, name: str = "all") -> bool:
        """The verdict of that name; False if the model did not draw."""
        return self.verdict.get(name, False)


def draw_tasks(
    model: MetaMorphForConditionalGeneration,
    processor: MetaMorphProcessor,
    pipeline: VisualizationPipeline,
    tasks: Sequence[DrawingTask],
    judge: Judge,
    settings: SamplerSettings,
    on_progress: Progress | None = None,
) -> list[Drawing]:
    """Ask for every picture, draw it and judge it.

    Args:
        model: The model.
        processor: Its processor.
        pipeline: Draws what the model's visual tokens stand for.
        tasks: What to ask for.
        judge: Says what is right.
        settings: How to draw.
        on_progress: Called with a number of tasks just answered, and again of tasks just drawn.

    Returns:
        One drawing per task, in order.
    """
    prompts = [task.prompt for task in tasks]
    replies = reply_to(model, processor, prompts, max_new_tokens=answer_budget(processor), on_progress=on_progress)
    drew = [index for index, reply in enumerate(replies) if reply.num_images]
    pictures: dict[int, Image.Image] = {}
    if drew:
        tokens = torch.stack([replies[index].visual_tokens[0] for index in drew])
        pictures = dict(zip(drew, draw(pipeline, tokens, settings, on_progress), strict=True))
    if on_progress is not None:
        on_progress(len(tasks) - len(drew))  # there is nothing to draw
    drawings = []
    for index, (task, reply) in enumerate(zip(tasks, replies, strict=True)):
        picture = pictures.get(index)
        verdict = {} if picture is None else dict(judge(picture, task.target))
        drawings.append(Drawing(task, reply, picture, verdict))
    return drawings


def summarise(drawings: Sequence[Drawing], names: Sequence[str] = ("all",)) -> dict[str, float]:
    """`{"n": number of tasks, name: share of tasks for which that verdict is true}`."""
    return {"n": len(drawings), **{name: fraction([item.is_right(name) for item in drawings]) for name in names}}


@torch.no_grad()
def encode_pictures(
    model: MetaMorphForConditionalGeneration,
    processor: MetaMorphProcessor,
    pictures: Sequence[Image.Image],
    batch_size: int = 128,
) -> Tensor:
    """The true visual tokens of pictures, [pictures, N, D] float32 on the CPU.

    Args:
        model: Its vision tower makes the tokens.
        processor: Its image processor prepares the pictures.
        pictures: One or more.
        batch_size: Pictures encoded at once.
    """
    model.eval()
    chunks = []
    for start in range(0, len(pictures), batch_size):
        pixels = processor(images=list(pictures[start : start + batch_size]), return_tensors="pt")["pixel_values"]
        chunks.append(model.get_visual_tokens(pixels.to(model.device)).float().cpu())
    return torch.cat(chunks)
