"""Draw visual tokens with a finished visualizer, for those who only want pictures."""

from __future__ import annotations

from collections.abc import Callable

import torch
from PIL import Image

from metamorph.flags.checks import names_flag


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
