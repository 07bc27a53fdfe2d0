"""Tiny detectors, CLIP and SigLIP models with random weights, saved as their published ones are."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    CLIPConfig,
    CLIPModel,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Owlv2Config,
    Owlv2ForObjectDetection,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
    SwinConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.grounding_dino.image_processing_pil_grounding_dino import GroundingDinoImageProcessorPil
from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil
from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil


SIDE = 32
_PAD, _UNKNOWN, _START, _END, _STOP, _ASK = 0, 100, 101, 102, 1012, 1029
"""BERT's numbers of [PAD], [UNK], [CLS], [SEP], "." and "?", which Grounding DINO relies on."""
_WORDS = ("a", "photo", "of", "colored", "object", "red", "green", "blue", "yellow", "cat", "dog", "-")
_TEXT = {"vocab_size": 1100, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
_ENDS = {"bos_token_id": _START, "eos_token_id": _END, "pad_token_id": _PAD}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 8,
}


def _swin(**options: object) -> SwinConfig:
    return SwinConfig(
        image_size=SIDE,
        patch_size=2,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        window_size=2,
        **options,
    )


def _save(model: PreTrainedModel, processor: object, folder: Path, *, tokenizer: bool = True) -> Path:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    if tokenizer:
        _tokenizer().save_pretrained(folder)
    return folder


def _tokenizer() -> PreTrainedTokenizerFast:
    numbers = {"[PAD]": _PAD, "[UNK]": _UNKNOWN, "[CLS]": _START, "[SEP]": _END, ".": _STOP, "?": _ASK}
    free = (number for number in range(1, 1100) if number not in numbers.values())
    vocabulary = {**numbers, **dict(zip(_WORDS, free, strict=False))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", _START), ("[SEP]", _END)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def save_clip(folder: Path) -> Path:
    """A CLIP."""
    torch.manual_seed(0)
    text = {**_TEXT, **_ENDS, "num_attention_heads": 2, "max_position_embeddings": 16}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=_VISION, projection_dim=16))
    size = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    return _save(model, CLIPImageProcessorPil(**size), folder)


def save_siglip(folder: Path) -> Path:
    """A SigLIP."""
    torch.manual_seed(0)
    text = {**_TEXT, **_ENDS, "num_attention_heads": 2, "max_position_embeddings": 16}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=_VISION))
    return _save(model, SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}), folder)


def save_mask2former(folder: Path, num_labels: int = 80) -> Path:
    """A Mask2Former with ten queries."""
    torch.manual_seed(0)
    config = Mask2FormerConfig(
        backbone_config=_swin(out_features=["stage1", "stage2", "stage3", "stage4"]),
        hidden_dim=32,
        feature_size=32,
        mask_feature_size=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        num_attention_heads=2,
        num_queries=10,
        num_labels=num_labels,
    )
    model = Mask2FormerForUniversalSegmentation(config)
    processor = Mask2FormerImageProcessorPil(size={"height": SIDE, "width": SIDE})
    return _save(model, processor, folder, tokenizer=False)


def save_grounding_dino(folder: Path) -> Path:
    """A Grounding DINO with ten queries."""
    torch.manual_seed(0)
    config = GroundingDinoConfig(
        backbone_config=_swin(out_features=["stage2", "stage3", "stage4"]),
        text_config=BertConfig(**_TEXT, num_attention_heads=2, pad_token_id=_PAD),
        num_queries=10,
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        num_feature_levels=4,
        max_text_len=64,
    )
    model = GroundingDinoForObjectDetection(config)
    processor = GroundingDinoImageProcessorPil(size={"shortest_edge": SIDE, "longest_edge": 2 * SIDE})
    return _save(model, processor, folder)


def save_owlv2(folder: Path) -> Path:
    """An OWLv2 with a query for each of 16 patches."""
    torch.manual_seed(0)
    text = {**_TEXT, **_ENDS, "num_attention_heads": 2, "max_position_embeddings": 16}
    model = Owlv2ForObjectDetection(Owlv2Config(text_config=text, vision_config=_VISION, projection_dim=16))
    return _save(model, Owlv2ImageProcessorPil(size={"height": SIDE, "width": SIDE}), folder)


SAVE = {"mask2former": save_mask2former, "grounding-dino": save_grounding_dino, "owlv2": save_owlv2}
