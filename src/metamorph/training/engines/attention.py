"""The attention implementation, and whether it keeps the samples of a packed row apart."""

from __future__ import annotations

import logging
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import is_flash_attn_2_available

from metamorph.models.modeling_metamorph import MetaMorphForConditionalGeneration
from metamorph.models.packed_attention import mask_of_samples
from metamorph.training.arguments import RunArguments


logger = logging.getLogger(__name__)

_SAMPLE = 4
"""Tokens of each test sample."""


def choose_attention(model: PreTrainedModel, args: RunArguments) -> None:
    """Set the attention of the language model, unless `--attn_implementation` is given, and log which it is."""
    decoder, training = model.get_decoder(), args.training
    is_half_on_gpu = training.device.type == "cuda" and args.compute_dtype != torch.float32
    if args.model.attn_implementation is None and is_half_on_gpu:
        if is_flash_attn_2_available() and decoder._supports_flash_attn:
            model.set_attn_implementation({"text_config": "flash_attention_2"})
        elif training.recompute != "selective" and flex_attention_fits(decoder):
            model.packed_kernel = "flex_attention"
    name = decoder.config._attn_implementation
    packed = f", packed rows by {model.packed_kernel}" if training.packing and name == "sdpa" else ""
    logger.info("attention: %s%s (--attn_implementation sets another)", name, packed)


def flex_attention_fits(decoder: PreTrainedModel) -> bool:
    """Whether flex attention can compute packed rows of a decoder on a GPU; it takes no dropout, nor small heads.

    It computes all samples at once, and skips the blocks between them.
    """
    config = decoder.config
    features = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    dropout = getattr(config, "attention_dropout", 0) or getattr(config, "attn_pdrop", 0)
    return decoder._supports_flex_attn and features >= 16 and not dropout


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
    mask = mask_of_samples(decoder, [[_SAMPLE, _SAMPLE]], decoder.device)
    try:
        with torch.no_grad():
            ours, theirs = (
                decoder(
                    inputs_embeds=row, position_ids=positions, attention_mask=mask, use_cache=False
                ).last_hidden_state[:, _SAMPLE:]
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
