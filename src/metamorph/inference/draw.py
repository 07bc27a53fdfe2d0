"""Draw images from visual tokens in batches; each image starts from its own noise."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor


if TYPE_CHECKING:  # needs diffusers, which is an extra
    from metamorph.visualization.pipeline import VisualizationPipeline


ProgressCallback = Callable[[int], object]
"""Called with the number of items that have just been finished."""


@dataclass(frozen=True)
class SamplerSettings:
    """How the visualizer draws."""

    guidance_scale: float | Sequence[float] = 3.0
    """Strength of classifier-free guidance; 1 is none. With several scales each image is drawn at each."""
    num_inference_steps: int = 20
    """Steps of the sampler."""
    seed: int = 0
    """Seed of the starting noise: image `i` starts from the noise of `seed + i`, however images are batched."""
    batch_size: int = 32
    """Images drawn at once."""


def draw(
    pipeline: "VisualizationPipeline",
    visual_tokens: Tensor,
    settings: SamplerSettings | None = None,
    on_progress: ProgressCallback | None = None,
    seeds: Sequence[int] | None = None,
) -> list[Image.Image]:
    """Draw RGB images of `visual_tokens` `[images, N, D]` (or `[N, D]`): image 1 at each guidance scale, image 2, …

    An image does not depend on the batch it is drawn in. `seeds` replace those of `settings`.
    """
    settings = settings or SamplerSettings()
    visual_tokens = visual_tokens[None] if visual_tokens.dim() == 2 else visual_tokens
    seeds = range(settings.seed, settings.seed + len(visual_tokens)) if seeds is None else seeds
    images: list[Image.Image] = []
    for start in range(0, len(visual_tokens), settings.batch_size):
        chunk = visual_tokens[start : start + settings.batch_size]
        drawn: Any = pipeline(
            chunk,
            guidance_scale=settings.guidance_scale,
            num_inference_steps=settings.num_inference_steps,
            # On the CPU, so that every device starts from the same noise.
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds[start : start + len(chunk)]],
        )
        images += drawn.images
        if on_progress is not None:
            on_progress(len(chunk))
    return images
