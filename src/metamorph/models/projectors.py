"""Connector into the language model, and vision head back to vision features."""

from itertools import pairwise

from torch import nn

from .configuration_metamorph import MetaMorphConfig


def build_mm_projector(config: MetaMorphConfig) -> nn.Module:
    """Build the connector [..., D] -> [..., H] that `mm_projector_type` names.

    `mlp{N}x_gelu` has N linear layers with GELU between them. `mlpsoftmax` is a softmax over the features followed by
    `mlp2x_gelu`. Layer names match the original's, so its connector files load.
    """
    vision, hidden = config.vision_feature_size, config.text_config.hidden_size
    kind = config.mm_projector_type
    if kind == "identity":
        return nn.Identity()
    if kind == "linear":
        return nn.Linear(vision, hidden)
    if kind == "mlpsoftmax":
        return nn.Sequential(nn.Softmax(dim=-1), *_mlp(vision, hidden, hidden, depth=2))
    depth = int(kind.removeprefix("mlp").removesuffix("x_gelu"))  # the configuration has checked the name
    return nn.Sequential(*_mlp(vision, hidden, hidden, depth))


def build_vision_head(config: MetaMorphConfig) -> nn.Module:
    """Build the vision head [..., H] -> [..., D].

    `mlp` and `mlp2x_gelu` both name the two-layer MLP with hidden size H, as in the original's recipes.
    """
    vision, hidden = config.vision_feature_size, config.text_config.hidden_size
    if config.vision_head_type == "linear":
        return nn.Linear(hidden, vision)
    return nn.Sequential(*_mlp(hidden, hidden, vision, depth=2))


def _mlp(size_in: int, size_hidden: int, size_out: int, depth: int) -> list[nn.Module]:
    sizes = [size_in, *[size_hidden] * (depth - 1), size_out]
    layers: list[nn.Module] = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), nn.GELU())]
    return layers[:-1]
