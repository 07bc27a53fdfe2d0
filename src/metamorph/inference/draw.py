"""Draw images from visual tokens in batches; each image starts from its own noise."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
    """Seed of the starting noise of the first image; see `of_image`."""
    batch_size: int = 32
    """Images drawn at once."""
    num_images: int = 1
    """Drawings of each image, from successive seeds."""

    @property
    def scales(self) -> tuple[float, ...]:
        """The guidance scales."""
        scale = self.guidance_scale
        return tuple(scale) if isinstance(scale, Sequence) else (scale,)

    @property
    def seeds(self) -> range:
        """The seeds of the drawings of the first image."""
        return range(self.seed, self.seed + self.num_images)

    @property
    def drawings(self) -> list[tuple[int, float]]:
        """Seed and guidance scale of each drawing of the first image, in the order in which they are drawn."""
        return list(itertools.product(self.seeds, self.scales))

    def of_image(self, number: int) -> "SamplerSettings":
        """The settings of image `number`, from 0 on: its seed is higher by `number`, however images are batched."""
        return replace(self, seed=self.seed + number)


def draw(
    pipeline: "VisualizationPipeline",
    visual_tokens: Tensor,
    settings: SamplerSettings | None = None,
    on_progress: ProgressCallback | None = None,
    seeds: Sequence[int] | None = None,
) -> list[Image.Image]:
    """Draw RGB images of `visual_tokens` `[images, N, D]` (or `[N, D]`): image 1 at each guidance scale, image 2, …

    An image does not depend on the batch it is drawn in. With several drawings of each image, those of image 1 come
    first, each at every guidance scale. `seeds`, one for each image, take the place of those of `settings`.
    """
    settings = settings or SamplerSettings()
    visual_tokens = visual_tokens[None] if visual_tokens.dim() == 2 else visual_tokens
    if seeds is None:
        seeds = [settings.of_image(index).seed for index in range(len(visual_tokens))]
    rows = [(index, each) for index, seed in enumerate(seeds) for each in replace(settings, seed=seed).seeds]
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


def draw_each(
    pipeline: "VisualizationPipeline",
    visual_tokens: Tensor,
    settings: SamplerSettings,
    seeds: Sequence[int] | None = None,
) -> list[tuple[Image.Image, ...]]:
    """The drawings of each image, in the order of `settings.drawings`; see `draw`."""
    drawn, count = draw(pipeline, visual_tokens, settings, seeds=seeds), len(settings.drawings)
    return [tuple(drawn[start : start + count]) for start in range(0, len(drawn), count)]
