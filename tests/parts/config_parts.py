"""Folders with the configurations of large models and no weights: what a dry run reads."""

import shutil
from pathlib import Path

from training_parts import TOKENIZER
from transformers import LlamaConfig, SiglipImageProcessorPil, SiglipVisionConfig


def make_llama_8b(folder: Path) -> Path:
    """The shapes of Llama-3.1-8B (its model card), with the golden tokenizer."""
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        tie_word_embeddings=False,
    ).save_pretrained(folder)
    for file in TOKENIZER.iterdir():
        shutil.copy(file, folder)
    return folder


def make_so400m(folder: Path) -> Path:
    """The shapes of SigLIP-SO400M/14 at 384 pixels (arXiv 2303.15343)."""
    SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
    ).save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": 384, "width": 384}).save_pretrained(folder)
    return folder
