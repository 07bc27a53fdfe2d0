"""Draw visual tokens with a finished visualizer, for those who only want pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from metamorph.flags.checks import names_flag
from metamorph.inference.reply import Progress
from metamorph.visualization.pipeline import VisualizationPipeline


def open_visualizer(
    folder: str, *, guidance_scale: float = 3.0, steps: int = 20, seed: int = 0
) -> Callable[[torch.Tensor], list[Image.Image]]:
    """Load a visualizer, and keep it on the CPU between two calls: the GPU belongs to training.

    Args:
        folder: What `metamorph train-visualizer` has written.
        guidance_scale: Strength of guidance.
        steps: Steps of the sampler.
        seed: Of the noise; the same in every call, so that pictures of different steps can be compared.

    Returns:
        A function from visual tokens `[images, N, D]` to RGB pictures. It draws on the accelerator if there is one.

    Raises:
        ValueError: If diffusers is not installed, or the folder is not a visualizer.
    """
    try:
        from metamorph.visualization.pipeline import VisualizationPipeline
    except ModuleNotFoundError as error:
        raise ValueError(
            f"--sample_visualizer {folder} needs {error.name}: pip install 'metamorph[visualization]'"
        ) from error
    with names_flag("--sample_visualizer", folder):
        pipeline = VisualizationPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)

    def draw(visual_tokens: torch.Tensor) -> list[Image.Image]:
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
        pipeline.to(device)
        try:
            (pictures,) = pipeline(
                visual_tokens,
                guidance_scale=guidance_scale,
                num_inference_steps=steps,
                generator=[torch.Generator("cpu").manual_seed(seed + index) for index in range(len(visual_tokens))],
                return_dict=False,
            )
            return pictures
        finally:
            pipeline.to("cpu")

    return draw


@dataclass(frozen=True)
class SamplerSettings:
    """How the visualizer draws."""

    guidance_scale: float = 2.0
    """Strength of classifier-free guidance; 1 is none."""
    num_inference_steps: int = 20
    """Steps of the sampler."""
    seed: int = 0
    """Seed of the starting noise: picture `i` starts from the noise of `seed + i`, however pictures are batched."""
    batch_size: int = 32
    """Pictures drawn at once."""


def draw_tokens(
    pipeline: VisualizationPipeline,
    visual_tokens: Tensor,
    settings: SamplerSettings,
    on_progress: Progress | None = None,
) -> list[Image.Image]:
    """Draw one picture per image of `visual_tokens`.

    Args:
        pipeline: The visualizer.
        visual_tokens: [images, N, D]
        settings: How to draw.
        on_progress: Called with the number of pictures just drawn.
    """
    pictures: list[Image.Image] = []
    for start in range(0, visual_tokens.shape[0], settings.batch_size):
        chunk = visual_tokens[start : start + settings.batch_size]
        seeds = range(settings.seed + start, settings.seed + start + chunk.shape[0])
        drawn: Any = pipeline(
            chunk,
            guidance_scale=settings.guidance_scale,
            num_inference_steps=settings.num_inference_steps,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        )
        pictures += drawn.images
        if on_progress is not None:
            on_progress(chunk.shape[0])
    return pictures
