"""Detectors of objects: Mask2Former, Grounding DINO and OWLv2 of Transformers, or a class of your own."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForUniversalSegmentation,
    AutoModelForZeroShotObjectDetection,
    AutoTokenizer,
    PreTrainedConfig,
)

from metamorph.evaluation.clip import Clip, check_clip
from metamorph.flags.checks import check_reachable, errors_name_flag
from metamorph.models.image_processing import load_image_processor


COCO_NAMES = Path(__file__).with_name("coco_names.txt")
"""The 80 classes of COCO in their order, under the names that GenEval's prompts have for them."""
_CODE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
"""`module:Class`."""
_GREY = "#999"
"""What GenEval shows around an object whose colour is asked for."""


@dataclass(frozen=True)
class Detection:
    """An object in an image."""

    name: str
    score: float
    """From 0 to 1."""
    box: tuple[float, float, float, float]
    """Left, top, right, bottom in pixels."""
    mask: np.ndarray | None = field(default=None, repr=False)
    """bool `[height, width]`; None if the detector finds boxes only."""


class Detector(Protocol):
    """Finds objects."""

    def detect(self, image: Image.Image, names: Sequence[str], threshold: float) -> list[Detection]:
        """The objects of these classes with a score of more than `threshold`, in any order."""


class ColorClassifier(Protocol):
    """Names colours."""

    def colors_of(
        self, image: Image.Image, objects: Sequence[Detection], name: str, colors: Sequence[str]
    ) -> list[str]:
        """The one of `colors` that each of the objects of class `name` has."""


def check_detector(reference: str, names: Sequence[str]) -> None:
    """Raise a `ValueError` or `FileNotFoundError` if there is no such detector, or it does not know these classes."""
    if _CODE.fullmatch(reference):
        _own_class(reference, "detector")
        return
    config = _config(reference)
    if config.model_type not in _DETECTORS:
        raise ValueError(f"detector {reference} is of type {config.model_type}, not one of {', '.join(_DETECTORS)}")
    if config.model_type == "mask2former" and (unknown := sorted(set(names) - set(_class_names(config)))):
        raise ValueError(
            f"detector {reference} does not know the class {unknown[0]!r} of the prompts: give another one"
        )


def load_detector(reference: str, device: torch.device) -> Detector:
    """The detector in a folder or on the Hub, or an instance of the class `module:Class`, which is imported."""
    if _CODE.fullmatch(reference):
        return _own_class(reference, "detector")()
    with errors_name_flag("detector", reference):
        return _DETECTORS[_config(reference).model_type](reference, device)


def check_colors(reference: str) -> None:
    """Raise a `ValueError` or `FileNotFoundError` if there is no such classifier of colours."""
    if _CODE.fullmatch(reference):
        _own_class(reference, "colors")
    else:
        check_clip(reference, "colors")


def load_colors(reference: str, device: torch.device) -> ColorClassifier:
    """A CLIP or SigLIP in a folder or on the Hub, or an instance of the class `module:Class`, which is imported."""
    if _CODE.fullmatch(reference):
        return _own_class(reference, "colors")()
    return ClipColors(Clip(reference, device, "colors"))


def _own_class(reference: str, option: str) -> Any:
    module, _, name = reference.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{option} {reference} cannot be imported ({error}): give module:Class") from error


def _config(reference: str) -> PreTrainedConfig:
    check_reachable(reference, "detector")
    with errors_name_flag("detector", reference):
        return AutoConfig.from_pretrained(reference, trust_remote_code=False)


def _class_names(config: PreTrainedConfig) -> list[str]:
    """Names of a model's classes; those of COCO have several spellings."""
    names = COCO_NAMES.read_text(encoding="utf-8").splitlines()
    return names if config.num_labels == len(names) else [config.id2label[index] for index in range(config.num_labels)]


class Mask2FormerDetector:
    """Instance segmentation with the classes that the model was trained on."""

    def __init__(self, reference: str, device: torch.device) -> None:
        self._processor = load_image_processor(reference)
        model = AutoModelForUniversalSegmentation.from_pretrained(
            reference, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
        )
        self._model = model.to(device).eval()

    @cached_property
    def _names(self) -> list[str]:
        return _class_names(self._model.config)

    @torch.no_grad()
    def detect(self, image: Image.Image, names: Sequence[str], threshold: float) -> list[Detection]:
        """See `Detector`."""
        inputs = self._processor(image, return_tensors="pt").to(self._model.device)
        outputs = self._model(**inputs)
        # Transformers makes the maps on the CPU and cannot fill them from another device.
        for name in ("class_queries_logits", "masks_queries_logits"):
            outputs[name] = outputs[name].float().cpu()
        (found,) = self._processor.post_process_instance_segmentation(
            outputs,
            threshold=threshold,
            target_sizes=[(image.height, image.width)],
            return_binary_maps=True,
        )
        detections = []
        for segment, mask in zip(found["segments_info"], found["segmentation"], strict=False):
            name = self._names[segment["label_id"]]
            if name in names and segment["score"] > threshold:
                shown = mask.bool().numpy()
                detections.append(Detection(name, segment["score"], _box(shown), shown))
        return detections


class _WordDetector:
    """A detector for classes in words."""

    def __init__(self, reference: str, device: torch.device) -> None:
        self._processor = load_image_processor(reference)
        self._tokenizer = AutoTokenizer.from_pretrained(reference, trust_remote_code=False)
        model = AutoModelForZeroShotObjectDetection.from_pretrained(
            reference, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
        )
        self._model = model.to(device).eval()


class GroundingDinoDetector(_WordDetector):
    """Boxes for the classes of the prompt, in words. A box has the class of the word that fits it best."""

    @torch.no_grad()
    def detect(self, image: Image.Image, names: Sequence[str], threshold: float) -> list[Detection]:
        """See `Detector`."""
        device = self._model.device
        pixels = self._processor(image, return_tensors="pt").to(device)
        text = self._tokenizer(" ".join(f"{name}." for name in names).lower(), return_tensors="pt").to(device)
        outputs = self._model(**pixels, **text)
        ids = text["input_ids"][0]
        # A class's words end with a full stop.
        stops = ids == self._tokenizer.convert_tokens_to_ids(".")
        is_word = ~stops & ~torch.isin(ids, torch.tensor(self._tokenizer.all_special_ids, device=device))
        place = stops.cumsum(0)
        of_class = torch.stack(
            [
                outputs.logits[0, :, : len(ids)][:, is_word & (place == index)].amax(dim=1)
                for index in range(len(names))
            ],
            dim=1,
        )
        return _boxes(of_class, outputs.pred_boxes[0], names, threshold, image.width, image.height)


class Owlv2Detector(_WordDetector):
    """Boxes for the classes of the prompt, in words."""

    @torch.no_grad()
    def detect(self, image: Image.Image, names: Sequence[str], threshold: float) -> list[Detection]:
        """See `Detector`."""
        device = self._model.device
        pixels = self._processor(image, return_tensors="pt").to(device)
        text = self._tokenizer(
            [f"a photo of a {name}" for name in names],
            padding="max_length",
            truncation=True,
            max_length=self._model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(device)
        outputs = self._model(**pixels, **text)
        side = max(image.size)  # the processor pads images to squares
        return _boxes(outputs.logits[0], outputs.pred_boxes[0], names, threshold, side, side)


_DETECTORS: dict[str, Any] = {
    "mask2former": Mask2FormerDetector,
    "grounding-dino": GroundingDinoDetector,
    "owlv2": Owlv2Detector,
}
"""By the types of Transformers' configurations."""


def _boxes(
    logits: torch.Tensor, boxes: torch.Tensor, names: Sequence[str], threshold: float, width: int, height: int
) -> list[Detection]:
    """Detections from `logits` `[boxes, classes]` and `boxes` (centre and size relative to width and height)."""
    best, labels = logits.max(dim=1)
    scores = best.sigmoid()
    classes = labels.tolist()
    scale = torch.tensor([width, height], device=boxes.device)
    center, size = boxes[:, :2] * scale, boxes[:, 2:] * scale
    corners = torch.cat([center - size / 2, center + size / 2], dim=1).tolist()
    return [
        Detection(names[classes[index]], scores[index].item(), tuple(corners[index]))
        for index in (scores > threshold).nonzero()[:, 0].tolist()
    ]


def _box(mask: np.ndarray) -> tuple[float, float, float, float]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


class ClipColors:
    """Zero-shot classification of an object's crop by CLIP, everything outside of its mask grey."""

    def __init__(self, clip: Clip) -> None:
        self._clip = clip
        self._texts: dict[tuple[str, tuple[str, ...]], torch.Tensor] = {}

    def colors_of(
        self, image: Image.Image, objects: Sequence[Detection], name: str, colors: Sequence[str]
    ) -> list[str]:
        """See `ColorClassifier`."""
        images = F.normalize(self._clip.images([_crop(image, item) for item in objects]), dim=-1)
        return [colors[index] for index in (images @ self._of_texts(name, tuple(colors)).T).argmax(dim=1).tolist()]

    def _of_texts(self, name: str, colors: tuple[str, ...]) -> torch.Tensor:
        """`[colors, D]`: for each colour the mean direction of its three sentences."""
        if (name, colors) not in self._texts:
            texts = [
                text.format(color=color, name=name)
                for color in colors
                for text in (
                    "a photo of a {color} {name}",
                    "a photo of a {color}-colored {name}",
                    "a photo of a {color} object",
                )
            ]
            features = F.normalize(self._clip.texts(texts), dim=-1).view(len(colors), 3, -1)
            self._texts[name, colors] = F.normalize(features.mean(dim=1), dim=-1)
        return self._texts[name, colors]


def _crop(image: Image.Image, item: Detection) -> Image.Image:
    if item.mask is not None:
        image = Image.composite(image, Image.new("RGB", image.size, _GREY), Image.fromarray(item.mask))
    width, height = image.size
    # At least a pixel, and nothing outside of the image: boxes of detectors may reach beyond it.
    left, top = min(max(int(item.box[0]), 0), width - 1), min(max(int(item.box[1]), 0), height - 1)
    right, bottom = max(round(item.box[2]), left + 1), max(round(item.box[3]), top + 1)
    return image.crop((left, top, min(right, width), min(bottom, height)))
