"""Edited images: what is kept, and does the image change as its caption does?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from metamorph.evaluation.clip import Clip, check_clip
from metamorph.evaluation.metrics.base import Metric, Tools
from metamorph.evaluation.samples import Answer, Sample
from metamorph.models.image_files import load_image


@dataclass(frozen=True)
class Edits(Metric):
    """Pixels and CLIP's features of an edited image, compared with the original and, if there is one, the target.

    An answer's first image counts. The others are resized to its size.
    """

    name: ClassVar[str] = "edits"
    headline: ClassVar[str] = "clip_direction"
    needs_images: ClassVar[bool] = True
    clip: str
    """Folder or Hub id of a CLIP or SigLIP."""

    def check(self, samples: Sequence[Sample]) -> None:
        """See `Metric.check`."""
        if not any("caption_before" in sample.reference and "caption_after" in sample.reference for sample in samples):
            raise ValueError(
                "no record has caption_before and caption_after, which clip_direction needs: add them, or judge the "
                "edits with the metric edit_judge"
            )
        check_clip(self.clip, "clip")

    def score(self, samples: Sequence[Sample], answers: Sequence[Answer], tools: Tools) -> list[dict[str, float]]:
        """The figures that a record allows; without an image only `drawn`, and 0 for `clip_direction`.

        - `clip_image`: cosine of original and result; a copy has 1.
        - `clip_direction`: cosine of the changes of image and caption; a copy has 0. `clip_text`: cosine of the result
          and `caption_after`.
        - `kept_l1`: mean absolute difference to the original outside of `mask`, 0 to 1; none if there is no outside.
        - `target_l1` and `target_clip`: the same measures against `target`, over the entire image.
        """
        clip = Clip(self.clip, tools.device)
        found = []
        for sample, answer in zip(samples, answers, strict=True):
            found.append(self._score(clip, sample, answer.images[0] if answer.images else None))
            tools.progress.update()
        return found

    def _score(self, clip: Clip, sample: Sample, file: Path | None) -> dict[str, float]:
        reference, files = sample.reference, sample.files
        has_captions = "caption_before" in reference and "caption_after" in reference
        if file is None:
            return {"drawn": 0.0, **({"clip_direction": 0.0} if has_captions else {})}
        result = load_image(file)
        images = [load_image(files["image"]), result]
        if "target" in files:
            images.append(load_image(files["target"]))
        features = F.normalize(clip.images(images), dim=-1)
        scores = {"drawn": 1.0, "clip_image": _cosine(features[0], features[1])}
        if has_captions:
            before, after = F.normalize(clip.texts([reference["caption_before"], reference["caption_after"]]), dim=-1)
            scores["clip_direction"] = _cosine(features[1] - features[0], after - before)
            scores["clip_text"] = _cosine(features[1], after)
        if "mask" in files and (kept := _is_dark(load_image(files["mask"]), result.size)).any():
            scores["kept_l1"] = float(_differences(images[0], result)[kept].mean())
        if "target" in files:
            scores["target_l1"] = float(_differences(images[2], result).mean())
            scores["target_clip"] = _cosine(features[2], features[1])
        return scores


def _cosine(first: Tensor, second: Tensor) -> float:
    return F.cosine_similarity(first, second, dim=0).item()


def _differences(image: Image.Image, result: Image.Image) -> np.ndarray:
    """Absolute differences of pixels in the size of `result`, averaged over channels, 0 to 1: `[height, width]`."""
    first, second = (
        np.asarray(each.resize(result.size, Image.Resampling.BICUBIC), np.float32) / 255 for each in (image, result)
    )
    return np.abs(first - second).mean(axis=-1)


def _is_dark(mask: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """Where a mask of that size is dark, `[height, width]`."""
    return np.asarray(mask.convert("L").resize(size, Image.Resampling.NEAREST)) < 128
