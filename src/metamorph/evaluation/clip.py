"""CLIP and SigLIP: images and texts as vectors that can be compared, without torchvision."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer

from metamorph.flags.checks import check_reachable, errors_name_flag
from metamorph.models.image_processing import load_image_processor


CLIP_TYPES = ("clip", "siglip", "siglip2")
"""Of Transformers' configurations."""
_BATCH_SIZE = 64


def check_clip(reference: str, option: str) -> None:
    """Raise a `ValueError` or `FileNotFoundError`, which names `option`, unless `reference` is a CLIP or SigLIP."""
    check_reachable(reference, option)
    with errors_name_flag(option, reference):
        config = AutoConfig.from_pretrained(reference, trust_remote_code=False)
    if config.model_type not in CLIP_TYPES:
        raise ValueError(
            f"{option} {reference} is of type {config.model_type}: give a CLIP or SigLIP with its text tower, such as "
            "openai/clip-vit-large-patch14"
        )


class Clip:
    """A CLIP or SigLIP with both towers, from a folder or the Hub."""

    def __init__(self, reference: str, device: torch.device, option: str = "clip") -> None:
        with errors_name_flag(option, reference):
            self._images = load_image_processor(reference)
            self._tokenizer = AutoTokenizer.from_pretrained(reference, trust_remote_code=False)
            model = AutoModel.from_pretrained(
                reference, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
            )
        self._model = model.to(device).eval()

    @torch.no_grad()
    def images(self, images: Sequence[Image.Image]) -> Tensor:
        """Features of images, `[images, D]` float32 on the CPU, of any length."""
        found = []
        for start in range(0, len(images), _BATCH_SIZE):
            inputs = self._images(list(images[start : start + _BATCH_SIZE]), return_tensors="pt")
            found.append(self._model.get_image_features(**inputs.to(self._model.device)).pooler_output.cpu())
        return torch.cat(found)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Features of texts, `[texts, D]` float32 on the CPU, of any length; long texts are cut as in training."""
        config = self._model.config
        is_clip = config.model_type == "clip"  # SigLIP was trained on texts of one length, padding seen
        inputs = self._tokenizer(
            list(texts),
            padding=True if is_clip else "max_length",
            return_attention_mask=is_clip,
            truncation=True,
            max_length=config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self._model.device)
        return self._model.get_text_features(**inputs).pooler_output.cpu()
