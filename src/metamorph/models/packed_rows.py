"""Whether a language model can be trained on packed rows: several samples in one row that must not see each other."""

from __future__ import annotations

import torch

from .modeling_metamorph import MetaMorphForConditionalGeneration


_SAMPLE = 4
"""Tokens of each of the two samples of the trial."""


def uses_flash_attention(model: MetaMorphForConditionalGeneration) -> bool:
    """Whether the language model computes attention by one of the flash attention libraries.

    They get the boundaries of samples by arguments of their own instead of a mask.

    Args:
        model: The model.
    """
    return "flash" in (model.get_decoder().config._attn_implementation or "")


def check_keeps_samples_apart(model: MetaMorphForConditionalGeneration) -> None:
    """Try with two short samples whether the second is the same whatever stands in the first.

    Attention keeps them apart, but layers that carry a state along the row (state-space models, linear attention) do
    not, and nothing would show it but a worse model. Not tried with flash attention, which needs a GPU.

    Args:
        model: The model, on any device.

    Raises:
        ValueError: If samples of one row would leak into each other.
    """
    if uses_flash_attention(model):
        return
    decoder, embed = model.get_decoder(), model.get_input_embeddings()
    first, second = (torch.full((1, _SAMPLE), token, device=decoder.device) for token in (0, 1))
    positions = torch.arange(_SAMPLE, device=decoder.device).repeat(1, 2)
    was_training = decoder.training
    decoder.eval()
    with torch.no_grad():
        one, other = (
            decoder(
                inputs_embeds=embed(torch.cat([start, second], dim=1)), position_ids=positions, use_cache=False
            ).last_hidden_state[:, _SAMPLE:]
            for start in (first, second)
        )
    decoder.train(was_training)
    if not torch.allclose(one, other, rtol=1e-3, atol=1e-4):
        raise ValueError(
            f"--packing True cannot be used with a language model of type {model.config.text_config.model_type}: "
            "samples of one row leak into each other, as in layers that carry a state along the row; "
            "add --packing False"
        )
