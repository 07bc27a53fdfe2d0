"""The two bridges: the connector into the language model, and the vision head back to vision features."""

import re

from torch import nn

from .configuration_metamorph import MetaMorphConfig


def build_mm_projector(config: MetaMorphConfig) -> nn.Module:
    """Builds the connector [..., D] -> [..., H] named by `mm_projector_type`.

    `mlp{N}x_gelu` has N linear layers with GELU between them. `mlpsoftmax` is `mlp2x_gelu` behind a softmax over the
    features. Layer names match the original's, so that its connector files load.
    """
    vision, hidden = config.vision_feature_size, config.text_config.hidden_size
    kind = config.mm_projector_type
    if kind == "identity":
        return nn.Identity()
    if kind == "linear":
        return nn.Linear(vision, hidden)
    if kind == "mlpsoftmax":
        return nn.Sequential(nn.Softmax(dim=-1), *_mlp(vision, hidden, hidden, depth=2))
    match = re.fullmatch(r"mlp(\d+)x_gelu", kind)
    assert match is not None  # the configuration validates the name
    return nn.Sequential(*_mlp(vision, hidden, hidden, depth=int(match.group(1))))


def build_vision_head(config: MetaMorphConfig) -> nn.Module:
    """Builds the vision head [..., H] -> [..., D]; its output is always the tower's feature size.

    `mlp` and `mlp2x_gelu` both name the two-layer MLP with hidden size H, as in the original's recipes.
    """
    vision, hidden = config.vision_feature_size, config.text_config.hidden_size
    if config.vision_head_type == "linear":
        return nn.Linear(hidden, vision)
    return nn.Sequential(*_mlp(hidden, hidden, vision, depth=2))


def _mlp(size_in: int, size_hidden: int, size_out: int, depth: int) -> list[nn.Module]:
    sizes = [size_in] + [size_hidden] * (depth - 1) + [size_out]
    layers: list[nn.Module] = []
    for i in range(depth):
        if i:
            layers.append(nn.GELU())
        layers.append(nn.Linear(sizes[i], sizes[i + 1]))
    return layers
