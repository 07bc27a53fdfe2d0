"""Images for captions: CLIP score, and Fréchet distances to the captions' own images."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from metamorph.evaluation.clip import Clip, check_clip
from metamorph.evaluation.metrics.base import Metric, Tools
from metamorph.evaluation.perceptual import ImageFeatures, frechet_distance, require_torchmetrics, to_pixels
from metamorph.evaluation.samples import Answer, Sample
from metamorph.models.image_files import load_image


logger = logging.getLogger(__name__)

_BATCH_SIZE = 32


@dataclass(frozen=True)
class Captions(Metric):
    """CLIP score of an image and its caption; FID and its variant with CLIP's features over all images."""

    name: ClassVar[str] = "captions"
    headline: ClassVar[str] = "clip_score"
    needs_images: ClassVar[bool] = True
    clip: str
    """Folder or Hub id of a CLIP or SigLIP."""
    inception: str | None = None
    """TorchScript file of FID's network (`inception-2015-12-05.pt` of StyleGAN3's metrics); without it, no `fid`."""

    def check(self, samples: Sequence[Sample]) -> None:
        """See `Metric.check`."""
        require_torchmetrics()
        check_clip(self.clip, "clip")
        if self.inception is not None:
            ImageFeatures.inception(self.inception, flag="inception")

    def score(self, samples: Sequence[Sample], answers: Sequence[Answer], tools: Tools) -> list[dict[str, float]]:
        """`clip_score`: 100 times the cosine of image and caption, at least 0, the mean over images."""
        clip, features_of = self._clip(tools), self._features_of(tools)
        found = []
        for sample, answer in zip(samples, answers, strict=True):
            score = 0.0
            if answer.images:
                cosines = F.cosine_similarity(features_of(answer.images), clip.texts([sample.reference["caption"]]))
                score = 100 * cosines.clamp(min=0).mean().item()
            found.append({"clip_score": score})
            tools.progress.update()
        return found

    def of_set(self, samples: Sequence[Sample], answers: Sequence[Answer], tools: Tools) -> dict[str, float]:
        """`clip_fid`, and `fid` with `inception`; lower is better."""
        drawn = [file for answer in answers for file in answer.images]
        true = [Path(sample.files["image"]) for sample in samples]
        if min(len(drawn), len(true)) < 2:
            return {}
        features_of = self._features_of(tools)
        of_drawn = torch.cat([features_of(answer.images) for answer in answers if answer.images]).double()
        sets = {"clip_fid": (of_drawn, _features(self._clip(tools).images, true))}
        if self.inception is not None:
            inception = ImageFeatures.inception(self.inception, tools.device, "inception")

            def network(images: list[Image.Image]) -> Tensor:
                return inception(to_pixels(images))

            sets["fid"] = (_features(network, drawn), _features(network, true))
        found = {}
        for name, (features, reference) in sets.items():
            if (count := min(len(features), len(reference))) < features.shape[1]:
                logger.warning(
                    "%s of %d images with %d features is much too large; compare it only with that of as many images",
                    name,
                    count,
                    features.shape[1],
                )
            found[name] = frechet_distance(reference, features)
        return found

    def _clip(self, tools: Tools) -> Clip:
        return tools.once("clip", lambda: Clip(self.clip, tools.device))

    def _features_of(self, tools: Tools) -> Callable[[tuple[Path, ...]], Tensor]:
        """CLIP's features of an answer's images, which are encoded once."""
        clip = self._clip(tools)
        return tools.once("features", lambda: cache(lambda files: clip.images([load_image(file) for file in files])))


def _features(network: Callable[[list[Image.Image]], Tensor], files: Sequence[Path]) -> Tensor:
    """Features of images, `[images, features]` float64; images of one size share a batch."""
    found = []
    for start in range(0, len(files), _BATCH_SIZE):
        images = [load_image(file) for file in files[start : start + _BATCH_SIZE]]
        found += [network(list(group)).double() for _, group in groupby(images, key=lambda image: image.size)]
    return torch.cat(found)
