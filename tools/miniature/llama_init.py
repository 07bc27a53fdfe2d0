"""How mini-llama's weights are drawn before training: with the two habits of attention that look-ups are made of.

A language model that answers "which colour is the circle?" has heads that bring the words just before a word to it
("red" to "circle"), and heads that find the same word earlier in the text ("circle" of the question to "circle" of the
description); together they are the induction circuit of Olsson et al. (2022, arXiv 2209.11895). A model as small as
this, trained for minutes, needs most of its time to discover them. So they are put in at the start, and training is
free to change them, in the spirit of mimetic initialisation (Trockman and Kolter, 2023, arXiv 2305.09828):

- A head that looks `distance` words back: biases of query and key, which rotary embedding turns into a function of
  the distance alone, with its maximum there. It brings part of the word that it finds as it is, so that a word's state
  resembles what stands around it.
- A head that finds the same word: equal weights for query and key, so that a word's query fits its own key best.

All else is drawn with standard deviation 1/sqrt(hidden), embeddings with 1. The usual 0.02 is far below that at this
width: attention and MLP would hardly change the residual stream at first.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention


LOOK_BACK = ((1, 2, 3, 4, 6), (1, 3))
"""Distances in words at which heads of the first and of the second layer look back, one head each."""
FREE_HEADS = 2
"""Heads of each layer from the third on that are left as drawn; the others find the same word."""

_SHARPNESS = 4.0
_LOWEST_FREQUENCY = 0.05


def initialise(model: LlamaForCausalLM, seed: int) -> None:
    """Draw all weights of `model`, which must have biases in its attention.

    Args:
        model: Changed in place.
        seed: Seed of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                # By fan-in: wider inputs (the MLP's way back) get smaller weights.
                module.weight.normal_(0, module.in_features**-0.5, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, nn.Embedding):
                module.weight.normal_(0, 1.0, generator=generator)
        frequencies = model.model.rotary_emb.inv_freq
        for index, layer in enumerate(model.model.layers):
            attention = layer.self_attn
            heads = _heads(attention.head_dim, model.config.num_attention_heads)
            distances = LOOK_BACK[index] if index < len(LOOK_BACK) else ()
            for head, distance in zip(heads, distances, strict=False):
                _look_back(attention, head, distance, frequencies, generator)
            if index > 0:  # the first layer has no context yet, only the words themselves
                same_word = heads[len(distances) :] if distances else heads[:-FREE_HEADS]
                for head in same_word:
                    attention.k_proj.weight[head] = attention.q_proj.weight[head]


def _heads(head_dim: int, count: int) -> list[slice]:
    """Rows of a projection that belong to each head."""
    return [slice(start, start + head_dim) for start in range(0, count * head_dim, head_dim)]


def _look_back(
    attention: LlamaAttention, head: slice, distance: int, frequencies: Tensor, generator: torch.Generator
) -> None:
    """Make a head's score largest for the word `distance` words before.

    With the query's bias `a` in each plane of the rotary embedding and the key's the same turned by `distance`, the
    score of words `n` apart is the sum of `a² cos((n − distance) f)` over the frequencies `f` of the planes.
    """
    # Slow planes do not tell neighbours apart.
    size = torch.where(frequencies >= _LOWEST_FREQUENCY, _SHARPNESS, 0.0)
    angle = frequencies * distance
    attention.q_proj.bias[head] = torch.cat([size, torch.zeros_like(size)])
    attention.k_proj.bias[head] = torch.cat([size * angle.cos(), size * angle.sin()])
    for projection in (attention.q_proj, attention.k_proj):
        # What the words are matters less than where they stand.
        projection.weight[head] /= 2
    hidden = attention.q_proj.in_features
    width = head.stop - head.start
    basis = torch.linalg.qr(torch.randn(hidden, width, generator=generator)).Q
    attention.v_proj.weight[head] = basis.T
    # What comes through so few dimensions is made as long as a word itself.
    attention.o_proj.weight[:, head] = basis * (hidden / width) ** 0.5
