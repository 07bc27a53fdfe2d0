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
    num_images: int = 1
    """Drawings of each image: drawing `k`, from 0 on, starts from the noise of a seed that is higher by `k`."""


def draw(
    pipeline: "VisualizationPipeline",
    visual_tokens: Tensor,
    settings: SamplerSettings | None = None,
    on_progress: ProgressCallback | None = None,
    seeds: Sequence[int] | None = None,
) -> list[Image.Image]:
    """Draw RGB images of `visual_tokens` `[images, N, D]` (or `[N, D]`): image 1 at each guidance scale, image 2, …

    An image does not depend on the batch it is drawn in. With several drawings of each image, those of image 1 come
    first, each at every guidance scale. `seeds`, one for each image, take the place of `settings.seed + i`.
    """
    settings = settings or SamplerSettings()
    visual_tokens = visual_tokens[None] if visual_tokens.dim() == 2 else visual_tokens
    if seeds is None:
        seeds = range(settings.seed, settings.seed + len(visual_tokens))
    rows = [(index, seed + number) for index, seed in enumerate(seeds) for number in range(settings.num_images)]
    images: list[Image.Image] = []
    for start in range(0, len(rows), settings.batch_size):
        chunk = rows[start : start + settings.batch_size]
        drawn: Any = pipeline(
            visual_tokens[[index for index, _ in chunk]],
            guidance_scale=settings.guidance_scale,
            num_inference_steps=settings.num_inference_steps,
            # On the CPU, so that every device starts from the same noise.
            generator=[torch.Generator("cpu").manual_seed(seed) for _, seed in chunk],
        )
        images += drawn.images
        if on_progress is not None:
            on_progress(len(chunk))
    return images
