"""The attention implementation, and whether it keeps the samples of a packed row apart."""

from __future__ import annotations

import logging
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import is_flash_attn_2_available

from metamorph.models.modeling_metamorph import MetaMorphForConditionalGeneration
from metamorph.training.arguments import RunArguments


logger = logging.getLogger(__name__)

_SAMPLE = 4
"""Tokens of each test sample."""


def choose_attention(model: PreTrainedModel, args: RunArguments) -> None:
    """Use flash attention where it is installed and works: on a GPU, in half precision.

    Does nothing if `--attn_implementation` is given.
    """
    is_float32 = args.compute_dtype == torch.float32
    if args.model.attn_implementation is not None or args.training.device.type != "cuda" or is_float32:
        return
    if is_flash_attn_2_available() and model.get_decoder()._supports_flash_attn:
        model.set_attn_implementation({"text_config": "flash_attention_2"})
        logger.info("attention: flash_attention_2 (--attn_implementation sdpa for PyTorch's own)")


def uses_flash_attention(model: MetaMorphForConditionalGeneration) -> bool:
    """Whether the language model uses a flash attention library, which takes sample boundaries instead of a mask."""
    return "flash" in (model.get_decoder().config._attn_implementation or "")


def check_keeps_samples_apart(model: MetaMorphForConditionalGeneration) -> None:
    """Test with a row of two short samples that the second does not depend on the first.

    Attention keeps them apart, but layers that carry a state along the row (state-space models, linear attention) do
    not, and nothing would show it but a worse model. This does not depend on the attention implementation of the other
    layers, so the test runs without flash attention, which needs a GPU and sample boundaries.
    """
    decoder: Any = model.get_decoder()
    table: torch.Tensor = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    first, other, second = torch.randn(3, 1, _SAMPLE, model.config.text_config.hidden_size, generator=generator)
    scale = table.detach().float().std().cpu()
    # Two rows that differ in the first sample only, each [1, 2 * _SAMPLE, hidden].
    rows = [(torch.cat([start, second], dim=1) * scale).to(decoder.device, table.dtype) for start in (first, other)]
    positions = torch.arange(_SAMPLE, device=decoder.device).repeat(1, 2)
    was_training, attention = decoder.training, decoder.config._attn_implementation
    if uses_flash_attention(model):
        decoder.config._attn_implementation = "sdpa" if decoder._supports_sdpa else "eager"
    decoder.eval()
    try:
        with torch.no_grad():
            ours, theirs = (
                decoder(inputs_embeds=row, position_ids=positions, use_cache=False).last_hidden_state[:, _SAMPLE:]
                for row in rows
            )
    finally:
        decoder.train(was_training)
        decoder.config._attn_implementation = attention
    if not torch.allclose(ours, theirs, rtol=0, atol=1e-4 * ours.abs().max().item()):
        raise ValueError(
            f"--packing True cannot be used with a language model of type {model.config.text_config.model_type}: "
            "samples of one row leak into each other, as in layers that carry a state along the row; "
            "add --packing False"
        )
