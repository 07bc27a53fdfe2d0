"""Model FLOPs of a training step: the operations that the model needs, not those that the hardware executes.

Counted are matrix products and attention, a multiplication and an addition as two. Not counted are norms, activations,
softmax, embedding look-ups, the interpolation of visual tokens, and what a better implementation would avoid: padding,
the masked half of causal attention, recomputation, logits without supervision. `docs/speed.md` has the formula.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from metamorph.models.vision_tower import TokenReduction
from metamorph.training.metrics import count_targets


@dataclass(frozen=True)
class Cost:
    """FLOPs of one unit of work."""

    forward: float
    backward: float = 0.0
    """Gradients of trained weights, and of inputs where something before them is trained."""

    @property
    def total(self) -> float:
        """Sum of both."""
        return self.forward + self.backward

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, count: float) -> Cost:
        return Cost(self.forward * count, self.backward * count)


class Work(NamedTuple):
    """Units of work of a step. The fields add up over micro-batches and ranks."""

    tokens: float
    """Positions of the decoder, including those of images, without padding."""
    pairs: float
    """Pairs of a position and one that it may attend to: L (L + 1) / 2 for a sample of L tokens."""
    images: float
    """Images that pass through the vision tower; 0 with a feature cache."""
    visual_tokens: float
    """Visual tokens that pass through the connector."""
    text_targets: float
    """Positions that pass through `lm_head`."""
    visual_targets: float
    """Positions that pass through the vision head."""


class ModelFlops(NamedTuple):
    """FLOPs of each unit of [`Work`], in its order, for what the stage trains. See [`model_flops`]."""

    token: Cost
    """Linear layers of the decoder."""
    pair: Cost
    """Attention of all decoder layers."""
    image: Cost
    """Vision tower."""
    visual_token: Cost
    """Reduction (`mlpmixer`) and connector."""
    text_target: Cost
    """`lm_head`."""
    visual_target: Cost
    """Vision head."""

    def total(self, work: Work) -> float:
        """FLOPs of forward and backward for an amount of work.

        Divided by seconds, number of devices and the peak FLOP/s of one, this is the model FLOPs utilisation (MFU).
        """
        return sum(cost.total * count for cost, count in zip(self, work, strict=True))


def model_flops(model: PreTrainedModel) -> ModelFlops:
    """FLOPs from the sizes of the layers and what requires a gradient; every layer counts as full causal attention.

    The model is one after `apply_stage`, before it is wrapped or sharded, on any device including `meta`.
    """
    config = model.config
    tower, decoder = model.model.vision_tower, model.get_decoder()
    tower_trained = _is_trained(tower.encoder)
    reduction_trained = tower_trained or _is_trained(tower.reduction)
    connector_trained = reduction_trained or _is_trained(model.model.mm_projector)
    # The first layer of the decoder always follows an embedding table or a connector.
    decoder_trained = connector_trained or _is_trained(decoder)
    text, vision = config.text_config, config.vision_config
    patches = config.patch_grid**2
    tower_tokens = patches + tower.num_prefix_tokens
    tower_layers = _layers_used(config.mm_vision_select_layer, vision.num_hidden_layers)
    tower_attention = _attention(4 * vision.hidden_size * tower_layers, trained=tower_trained)
    patch_embedding = [module for module in tower.encoder.modules() if isinstance(module, nn.Conv2d)]
    heads, head_dim = text.num_attention_heads, getattr(text, "head_dim", None)
    width = heads * (head_dim or text.hidden_size // heads)
    return ModelFlops(
        token=_linears(decoder, text, inputs_need=decoder_trained),
        pair=_attention(4 * width * text.num_hidden_layers, trained=decoder_trained),
        image=_linears(tower.encoder, vision, inputs_need=tower_trained) * tower_tokens
        + sum((_convolution(module) * patches for module in patch_embedding), Cost(0))
        + tower_attention * tower_tokens**2,
        visual_token=_reduction(tower.reduction, vision.hidden_size, inputs_need=tower_trained)
        + _chain(model.model.mm_projector, inputs_need=reduction_trained),
        text_target=_matrix(text.hidden_size * text.vocab_size, model.lm_head.weight, inputs_need=decoder_trained),
        visual_target=_chain(model.vision_head, inputs_need=decoder_trained) if config.use_vision_ar else Cost(0),
    )


def count_work(batch: dict[str, Any], num_image_tokens: int) -> Tensor:
    """Count the work of a micro-batch of one of our collators, on its device and without synchronization.

    Without `sample_lengths` in its `indices`, a padded batch is counted by its `attention_mask`, and a packed one by
    its `position_ids`, which count the padding at the end of a row as another sample.

    The result is int64 `[6]`, the fields of [`Work`] in their order: sum them, then `Work(*total.tolist())`.
    """
    lengths = batch.get("indices", {}).get("sample_lengths")
    if lengths is None and "attention_mask" in batch:
        lengths = batch["attention_mask"].sum(dim=-1)
    if lengths is not None:
        tokens, pairs = lengths.sum(), (lengths * (lengths + 1) // 2).sum()
    else:
        pairs = (batch["position_ids"] + 1).sum()
        tokens = torch.full_like(pairs, batch["position_ids"].numel())
    pixels, features = batch.get("pixel_values"), batch.get("visual_tokens")
    images = 0 if pixels is None else pixels.shape[0]
    encoded = images * num_image_tokens if features is None else features.shape[0] * features.shape[1]
    text, visual = count_targets(batch).unbind()
    known = [torch.full_like(tokens, number) for number in (images, encoded)]
    return torch.stack([tokens, pairs, *known, text, visual])


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _layers_used(select_layer: int, num_layers: int) -> int:
    """Layers of the tower before hidden state `select_layer`; the others are not computed."""
    return select_layer if select_layer >= 0 else num_layers + 1 + select_layer


def _attention(forward: float, *, trained: bool) -> Cost:
    """Two products forward (scores, values), four backward (both inputs of each)."""
    return Cost(forward, 2 * forward if trained else 0)


def _matrix(size: int, weight: Tensor, *, inputs_need: bool) -> Cost:
    """Product of one position with a matrix of `size` numbers."""
    return Cost(2 * size, 2 * size * (weight.requires_grad + inputs_need))


def _linears(module: nn.Module, config: PreTrainedConfig, *, inputs_need: bool) -> Cost:
    """All linear layers of a module for one position, including the experts that a token visits."""
    cost = Cost(0)
    layer: Any  # the sizes of a linear layer are attributes of its class, including quantised ones
    for layer in module.modules():
        for name, weight in layer.named_parameters(recurse=False):
            if name == "weight" and hasattr(layer, "in_features"):
                size = layer.in_features * layer.out_features  # quantised and sharded weights have other shapes
            elif weight.ndim == 3 and hasattr(config, "num_experts_per_tok"):  # [experts, in, out]
                size = weight.numel() // weight.shape[0] * config.num_experts_per_tok
            else:
                continue
            cost += _matrix(size, weight, inputs_need=inputs_need)
    return cost


def _convolution(layer: nn.Conv2d) -> Cost:
    """Patch embedding for one patch. Pixels never need a gradient."""
    size = layer.in_channels * layer.out_channels * layer.kernel_size[0] * layer.kernel_size[1]
    return _matrix(size, layer.weight, inputs_need=False)


def _chain(module: nn.Module, *, inputs_need: bool) -> Cost:
    """Consecutive linear layers, for one token; an input needs a gradient if anything before it is trained."""
    cost = Cost(0)
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            cost += _matrix(layer.in_features * layer.out_features, layer.weight, inputs_need=inputs_need)
            inputs_need = inputs_need or layer.weight.requires_grad
    return cost


def _reduction(reduction: TokenReduction, hidden: int, *, inputs_need: bool) -> Cost:
    """`mlpmixer` for one visual token; the other reductions have no weights."""
    if reduction.method != "mlpmixer":
        return Cost(0)
    inputs_need = inputs_need or _is_trained(reduction)  # a norm with trained weights precedes the first layer
    tokens = _chain(reduction.token_mixer, inputs_need=inputs_need) * (hidden / reduction.num_tokens)
    return tokens + _chain(reduction.channel_mixer, inputs_need=inputs_need)
