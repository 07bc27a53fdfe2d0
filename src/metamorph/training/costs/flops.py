"""Model FLOPs of a training step: what the arithmetic of the model needs, whatever the hardware does beside it.

Counted are matrix products and attention, a multiplication with its addition as two; norms, activations, softmax,
embedding look-ups and the interpolation of visual tokens are left out. Not counted either is what a better program
would not do: padding, the masked half of causal attention, activations computed again by checkpointing, logits that
nothing supervises. `docs/speed.md` has the formula.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from metamorph.models.vision_tower import TokenReduction
from metamorph.training.metrics import count_targets


@dataclass(frozen=True)
class Cost:
    """FLOPs of one unit of work."""

    forward: float
    """Of the forward pass."""
    backward: float = 0.0
    """Of the backward pass: gradients of the trained weights, and of inputs where something before them is trained."""

    @property
    def total(self) -> float:
        """Forward and backward."""
        return self.forward + self.backward

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, count: float) -> Cost:
        return Cost(self.forward * count, self.backward * count)


@dataclass(frozen=True)
class Work:
    """How much of each unit a step processes. Sums over micro-batches and ranks are sums of the fields."""

    tokens: float
    """Positions of the decoder that hold a token, those of images included, padding not."""
    pairs: float
    """Pairs of a position and one that it may attend to: L (L + 1) / 2 for a sample of L tokens."""
    images: float
    """Images that pass the vision tower; 0 with a feature cache."""
    visual_tokens: float
    """Visual tokens that pass the connector."""
    text_targets: float
    """Positions that pass `lm_head`."""
    visual_targets: float
    """Positions that pass the vision head."""


@dataclass(frozen=True)
class ModelFlops:
    """FLOPs of each unit of work of one model, for the parts that its stage trains. See [`model_flops`]."""

    token: Cost
    """Linear layers of the decoder, for one token."""
    pair: Cost
    """Attention of all layers of the decoder, for one pair of positions."""
    image: Cost
    """The vision tower, for one image."""
    visual_token: Cost
    """Reduction (`mlpmixer`) and connector, for one visual token."""
    text_target: Cost
    """`lm_head`, for one position."""
    visual_target: Cost
    """The vision head, for one position."""

    def parts(self, work: Work) -> dict[str, Cost]:
        """FLOPs of each part for some work.

        Args:
            work: Of one step, or of any number of them.

        Returns:
            `decoder`, `attention`, `vision_tower`, `mm_projector`, `lm_head` and `vision_head`.
        """
        return {
            "decoder": self.token * work.tokens,
            "attention": self.pair * work.pairs,
            "vision_tower": self.image * work.images,
            "mm_projector": self.visual_token * work.visual_tokens,
            "lm_head": self.text_target * work.text_targets,
            "vision_head": self.visual_target * work.visual_targets,
        }

    def total(self, work: Work) -> float:
        """FLOPs of forward and backward for some work.

        Divided by seconds, number of devices and the peak FLOP/s of one, it is the model FLOPs utilisation (MFU).

        Args:
            work: Of one step, or of any number of them, on all devices together.
        """
        return sum(cost.total for cost in self.parts(work).values())


def model_flops(model: PreTrainedModel) -> ModelFlops:
    """Measure a model: from the sizes of its layers and from what requires a gradient.

    Args:
        model: A MetaMorph model after `apply_stage`, before it is wrapped or sharded; on any device, `meta` included.

    Returns:
        The FLOPs of each unit of work. Attention windows are not modelled: every layer counts as full causal
        attention.
    """
    config = model.config
    tower, decoder = model.model.vision_tower, model.get_decoder()
    tower_trained = _is_trained(tower.encoder)
    reduction_trained = tower_trained or _is_trained(tower.reduction)
    connector_trained = reduction_trained or _is_trained(model.model.mm_projector)
    # The first layer of the decoder always has an embedding table or a connector in front of it.
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
        text_target=_product(text.hidden_size, text.vocab_size, model.lm_head.weight, inputs_need=decoder_trained),
        visual_target=_chain(model.vision_head, inputs_need=decoder_trained) if config.use_vision_ar else Cost(0),
    )


def count_work(batch: dict[str, Any], num_image_tokens: int) -> Tensor:
    """Count the work of a micro-batch, on the device that it is on and without waiting for it.

    Args:
        batch: A batch of one of our collators. The `sample_lengths` of its `indices` say how long the samples are;
            without them a padded batch is counted by its `attention_mask`, and a packed one by its `position_ids`,
            which take the padding at the end of a row for one more sample.
        num_image_tokens: Visual tokens for each image (`N`).

    Returns:
        int64 [6], the fields of [`Work`] in their order: sum them, then `Work(*total.tolist())`.
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
    work = torch.stack([tokens, pairs, *known, text, visual])
    assert len(work) == len(fields(Work))
    return work


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _layers_used(select_layer: int, num_layers: int) -> int:
    """Layers of the tower in front of hidden state `select_layer`; those behind it are cut off."""
    return select_layer if select_layer >= 0 else num_layers + 1 + select_layer


def _attention(forward: float, *, trained: bool) -> Cost:
    """Two products forward (scores, values), four backward (both inputs of each)."""
    return Cost(forward, 2 * forward if trained else 0)


def _linears(module: nn.Module, config: PreTrainedConfig, *, inputs_need: bool) -> Cost:
    """All linear layers of a module for one position, the experts that a token visits included.

    Sizes are not those of the weights, which quantised and sharded layers keep in other shapes.
    """
    cost = Cost(0)
    layer: Any  # the sizes of a linear layer are attributes of its class, quantised ones included
    for layer in module.modules():
        for name, weight in layer.named_parameters(recurse=False):
            if name == "weight" and hasattr(layer, "in_features"):
                products = layer.in_features * layer.out_features
            elif weight.ndim == 3 and hasattr(config, "num_experts_per_tok"):  # [experts, in, out]
                products = weight.numel() // weight.shape[0] * config.num_experts_per_tok
            else:
                continue
            cost += Cost(2 * products, 2 * products * (weight.requires_grad + inputs_need))
    return cost


def _product(size_in: int, size_out: int, weight: Tensor, *, inputs_need: bool) -> Cost:
    """One linear layer for one position."""
    return Cost(2 * size_in * size_out, 2 * size_in * size_out * (weight.requires_grad + inputs_need))


def _convolution(layer: nn.Conv2d) -> Cost:
    """Patch embedding for one patch. Pixels never need a gradient."""
    forward = 2 * layer.in_channels * layer.out_channels * layer.kernel_size[0] * layer.kernel_size[1]
    return Cost(forward, forward if layer.weight.requires_grad else 0)


def _chain(module: nn.Module, *, inputs_need: bool) -> Cost:
    """Linear layers behind each other, for one token; an input needs a gradient if anything before it is trained."""
    cost, flows = Cost(0), inputs_need
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            forward = 2 * layer.in_features * layer.out_features
            cost += Cost(forward, forward * (layer.weight.requires_grad + flows))
            flows = flows or layer.weight.requires_grad
    return cost


def _reduction(reduction: TokenReduction, hidden: int, *, inputs_need: bool) -> Cost:
    """`mlpmixer` for one visual token; nothing for the reductions without weights."""
    if reduction.method != "mlpmixer":
        return Cost(0)
    cost = Cost(0)
    flows = inputs_need or _is_trained(reduction)  # a norm with trained weights precedes the first layer
    for mixer, share in ((reduction.token_mixer, hidden / reduction.num_tokens), (reduction.channel_mixer, 1)):
        for layer in mixer:
            if isinstance(layer, nn.Linear):
                forward = 2 * layer.in_features * layer.out_features * share
                cost += Cost(forward, forward * (layer.weight.requires_grad + flows))
    return cost
