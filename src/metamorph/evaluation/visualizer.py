"""How good a visualizer is alone: images are reconstructed from their visual tokens and compared with the originals.

The comparison is made in the space in which the model draws: the vision tower encodes the drawing, and its tokens are
compared with those of the original. Tokens of any two images have a high cosine, so the cosine to *other* originals
shows how much of it means nothing, and retrieval shows whether the drawing is nearest to its own original.
"""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from metamorph.evaluation.perceptual import ImageFeatures, frechet_distance, lpips_distances, to_pixels
from metamorph.evaluation.tokens import cosines, num_nearer
from metamorph.inference.draw import ProgressCallback, SamplerSettings, draw
from metamorph.models.image_processing import to_rgb
from metamorph.visualization.grids import reconstruction_grid
from metamorph.visualization.pipeline import VisualizationPipeline
from metamorph.visualization.pixels import crop_square


_SMALLEST_CELL = 128
"""Pixels; drawings of smaller images are enlarged in grids."""


@dataclass
class ScaleScores:
    """Scores at one guidance scale; lists have one entry per image."""

    guidance_scale: float
    cosine: list[float] = field(default_factory=list)
    """Cosine of drawing and original, averaged over tokens."""
    cosine_to_others: list[float] = field(default_factory=list)
    """Mean cosine with the other originals; empty if there is only one image."""
    is_nearest: list[bool] = field(default_factory=list)
    """Whether no original has a larger cosine with the drawing than its own."""
    lpips: list[float] = field(default_factory=list)
    """LPIPS distance to the original; empty without weights."""
    fid: float | None = None
    """Fréchet distance between features of drawings and originals; None without weights."""

    def to_dict(self) -> dict[str, Any]:
        """Means and standard deviations over images, ready for JSON."""
        found: dict[str, Any] = {"guidance_scale": self.guidance_scale, "n": len(self.cosine)}
        for name in ("cosine", "cosine_to_others", "lpips"):
            if values := getattr(self, name):
                deviation = statistics.stdev(values) if len(values) > 1 else 0.0
                found[name] = {"mean": round(statistics.fmean(values), 5), "std": round(deviation, 5)}
        found["retrieval_at_1"] = round(statistics.fmean(self.is_nearest), 5)
        if self.fid is not None:
            found["fid"] = round(self.fid, 4)
        return found


@dataclass(frozen=True)
class Reconstructions:
    """Scores at every scale, and the first images with their drawings."""

    scales: list[ScaleScores]
    """One for each guidance scale, in their order."""
    originals: list[Image.Image] = field(repr=False)
    """The central squares of the first images, in the size of the drawings."""
    drawn: list[Image.Image] = field(repr=False)
    """Their drawings: image 1 at each scale, image 2 at each, …"""

    def grid(self) -> Image.Image:
        """One row per kept image: the original, then its drawing at each scale."""
        side = max(_SMALLEST_CELL, self.drawn[0].width)
        scales = [score.guidance_scale for score in self.scales]
        return reconstruction_grid(self.originals, self.drawn, scales, side=side, gap=2)


def evaluate_visualizer(
    pipeline: VisualizationPipeline,
    images: Sequence[Image.Image],
    settings: SamplerSettings,
    *,
    keep: int = 8,
    lpips: ImageFeatures | None = None,
    inception: ImageFeatures | None = None,
    on_progress: ProgressCallback | None = None,
) -> Reconstructions:
    """Encode the central squares of images, draw them, encode the drawings and compare.

    Each image is drawn at every guidance scale, from the same noise; the drawings of the first `keep` images are kept
    for a grid. `images` may load an image when it is asked for: each is asked for twice. The tokens of all stay in
    memory (64 tokens of 1,152 features: 0.3 MB each). The pipeline must have a vision tower.
    """
    if pipeline.vision_tower is None:
        raise ValueError("the visualizer has no vision tower; load it with metamorph.visualization.load_visualizer")
    if not len(images):
        raise ValueError("there are no images to reconstruct; give at least one")
    scores = [ScaleScores(scale) for scale in settings.scales]
    features: list[list[Tensor]] = [[] for _ in (None, *scores)]  # of the originals, then at each scale
    keys = torch.cat([_tokens(pipeline, chunk) for _, chunk in _chunks(images, settings.batch_size)])
    kept_originals: list[Image.Image] = []
    kept_drawn: list[Image.Image] = []
    for start, chunk in _chunks(images, settings.batch_size):
        drawn = draw(pipeline, keys[start : start + len(chunk)], settings.of_image(start))
        originals = [crop_square(to_rgb(image)).resize(drawn[0].size, Image.Resampling.BICUBIC) for image in chunk]
        for number, score in enumerate(scores):
            at_scale = drawn[number :: len(scores)]
            _compare_tokens(score, _tokens(pipeline, at_scale), keys, start)
            if lpips is not None:
                score.lpips += lpips_distances(lpips, to_pixels(originals), to_pixels(at_scale))
            if inception is not None:
                features[number + 1].append(inception(to_pixels(at_scale)))
        if inception is not None:
            features[0].append(inception(to_pixels(originals)))
        room = max(0, keep - len(kept_originals))
        kept_originals += originals[:room]
        kept_drawn += drawn[: room * len(scores)]
        if on_progress is not None:
            on_progress(len(chunk))
    if inception is not None and len(images) > 1:
        for score, found in zip(scores, features[1:], strict=True):
            score.fid = frechet_distance(torch.cat(features[0]), torch.cat(found))
    return Reconstructions(scores, kept_originals, kept_drawn)


def _chunks(images: Sequence[Image.Image], size: int) -> Iterator[tuple[int, list[Image.Image]]]:
    """Pairs of the index of the first image and the next `size` images."""
    for start in range(0, len(images), size):
        yield start, [images[index] for index in range(start, min(start + size, len(images)))]


def _tokens(pipeline: VisualizationPipeline, images: Sequence[Image.Image]) -> Tensor:
    return pipeline.vision_tower.encode_images(images).cpu()


def _compare_tokens(score: ScaleScores, drawn: Tensor, originals: Tensor, start: int) -> None:
    """Add the cosines of `drawn [images, N, D]`, drawings of the `originals [all, N, D]` from `start` on."""
    similarity = cosines(drawn, originals)
    own = similarity.diagonal(start)
    score.cosine += own.tolist()
    score.is_nearest += (num_nearer(similarity, own) == 0).tolist()
    if len(originals) > 1:
        score.cosine_to_others += ((similarity.sum(dim=1) - own) / (len(originals) - 1)).tolist()
