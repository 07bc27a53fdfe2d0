"""Generated images: prompt → visual tokens → pixels → verdict.

The caller decides what makes an image right: a judge is any function from an image and a target to named verdicts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from metamorph.evaluation.questions import answer_budget, fraction
from metamorph.inference.draw import ProgressCallback, SamplerSettings, draw
from metamorph.inference.prompt import Prompt
from metamorph.inference.reply import Reply, reply_to
from metamorph.models.modeling_metamorph import MetaMorphForConditionalGeneration
from metamorph.models.processing_metamorph import MetaMorphProcessor
from metamorph.visualization.pipeline import VisualizationPipeline


Judge = Callable[[Image.Image, Any], Mapping[str, bool]]
"""Maps an image and what it should show to verdicts by name, for example `{"color": True, "all": False}`."""


@dataclass(frozen=True)
class DrawingTask:
    """Something to draw."""

    prompt: Prompt
    target: Any
    """What the image should show, in the judge's terms."""


@dataclass(frozen=True)
class Drawing:
    """A task and its result."""

    task: DrawingTask
    reply: Reply
    image: Image.Image | None = field(repr=False)
    """The first image of the reply; None if the model did not draw."""
    verdict: dict[str, bool]
    """The judge's verdicts; empty without an image."""

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
    on_progress: ProgressCallback | None = None,
) -> list[Drawing]:
    """Ask for every image, draw it and judge it.

    `on_progress` is called twice for every task: when it is answered, and when it is drawn.
    """
    prompts = [task.prompt for task in tasks]
    replies = reply_to(model, processor, prompts, max_new_tokens=answer_budget(processor), on_progress=on_progress)
    drew = [index for index, reply in enumerate(replies) if reply.num_images]
    images: dict[int, Image.Image] = {}
    if drew:
        tokens = torch.stack([replies[index].visual_tokens[0] for index in drew])
        images = dict(zip(drew, draw(pipeline, tokens, settings, on_progress), strict=True))
    if on_progress is not None:
        on_progress(len(tasks) - len(drew))  # nothing to draw
    verdicts = {index: dict(judge(image, tasks[index].target)) for index, image in images.items()}
    return [
        Drawing(task, replies[index], images.get(index), verdicts.get(index, {})) for index, task in enumerate(tasks)
    ]


def summarise(drawings: Sequence[Drawing], names: Sequence[str] = ("all",)) -> dict[str, float]:
    """`{"n": number of tasks, name: share of tasks for which that verdict is true}`."""
    return {"n": len(drawings), **{name: fraction([item.is_right(name) for item in drawings]) for name in names}}


@torch.no_grad()
def encode_images(
    model: MetaMorphForConditionalGeneration,
    processor: MetaMorphProcessor,
    images: Sequence[Image.Image],
    batch_size: int = 128,
) -> Tensor:
    """The true visual tokens of one or more images, `[images, N, D]` float32 on the CPU."""
    model.eval()
    chunks = []
    for start in range(0, len(images), batch_size):
        pixels = processor(images=list(images[start : start + batch_size]), return_tensors="pt")["pixel_values"]
        chunks.append(model.get_visual_tokens(pixels.to(model.device)).float().cpu())
    return torch.cat(chunks)
