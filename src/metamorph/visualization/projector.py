"""From visual tokens to the conditioning of a diffusion UNet: one network for training and inference.

A Stable Diffusion UNet attends to a sequence of text embeddings `[images, 77, cross_attention_dim]`. The projector
replaces them by visual tokens `[images, N, D]`. It has four forms, as in the original MetaMorph: an MLP,
cross-attention with and without feed-forward networks, and a transformer. Parameter names inside `network` are those
of the original's weight files, so that they load unchanged.
"""

from itertools import pairwise

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn
from torch.nn import functional as F


PROJECTOR_MODES = ("mlp", "xattn", "xattnffn", "transformer")
CONDITION_LENGTH = 77
"""Length of the condition that Stable Diffusion was trained with: CLIP's text context."""

_QUERY_INIT_STD = 0.02


def pad_condition(condition: torch.Tensor) -> torch.Tensor:
    """Append zeros to `[images, tokens, cross_attention_dim]` until there are `CONDITION_LENGTH` tokens.

    This is the only place that pads, so training and inference cannot disagree. A longer condition is returned
    unchanged: the UNet's cross-attention takes any length, and cutting would discard parts of the image.
    """
    missing = CONDITION_LENGTH - condition.shape[1]
    return condition if missing <= 0 else F.pad(condition, (0, 0, 0, missing))


class VisualizationProjector(ModelMixin, ConfigMixin):
    """Visual tokens `[images, N, input_dim]` to condition tokens `[images, N', output_dim]`.

    `N'` is `N` in mode `mlp` and `num_tokens` in the other modes. The result is not padded (`pad_condition`).

    Args:
        input_dim: Feature size D of the visual tokens.
        hidden_dim: Hidden width of `mlp` and `transformer`; `xattn` and `xattnffn` work in `output_dim`.
        output_dim: `cross_attention_dim` of the UNet.
        num_tokens: Number of learned queries, and so of output tokens, in the modes that have queries.
        num_layers: Linear layers (`mlp`), attention layers, or layers of encoder and decoder each.
        num_heads: Attention heads.
        mode: One of `mlp`, `xattn`, `xattnffn`, `transformer`.
        normalize_input: Apply a LayerNorm to the visual tokens first. L2-normalised tokens have entries of about 1/√D;
            this scales them to 1. Off in the original.
        num_positions: With N > 0, add a learned embedding to each of the N visual tokens of an image, because `mlp`
            sees one token at a time and not its place. Off (0) in the original.
    """

    @register_to_config
    def __init__(
        self,
        input_dim: int = 1152,
        hidden_dim: int = 2048,
        output_dim: int = 768,
        num_tokens: int = CONDITION_LENGTH,
        num_layers: int = 2,
        num_heads: int = 8,
        mode: str = "mlp",
        normalize_input: bool = False,
        num_positions: int = 0,
    ) -> None:
        super().__init__()
        self.input_layer_norm = nn.LayerNorm(input_dim) if normalize_input else nn.Identity()
        self.position_embeddings = None
        if num_positions:
            self.position_embeddings = nn.Parameter(torch.empty(1, num_positions, input_dim))
            # As large as the tokens it is added to: larger it would be noise, smaller it would have no effect.
            nn.init.normal_(self.position_embeddings, std=1.0 if normalize_input else input_dim**-0.5)
        self.network: nn.Module
        if mode == "mlp":
            self.network = _MlpProjector(input_dim, hidden_dim, output_dim, num_layers)
        elif mode in ("xattn", "xattnffn"):
            self.network = _CrossAttentionProjector(
                input_dim, output_dim, num_tokens, num_layers, num_heads, feed_forward=mode == "xattnffn"
            )
        elif mode == "transformer":
            self.network = _TransformerProjector(input_dim, hidden_dim, output_dim, num_tokens, num_layers, num_heads)
        else:
            raise ValueError(f"mode={mode!r} is not a projector; --mode takes one of {', '.join(PROJECTOR_MODES)}.")

    def forward(self, visual_tokens: torch.Tensor) -> torch.Tensor:
        """Project visual tokens `[images, N, input_dim]` to `[images, N', output_dim]`."""
        if visual_tokens.dim() != 3 or visual_tokens.shape[-1] != self.config.input_dim:
            raise ValueError(
                f"The projector takes visual tokens [images, tokens, {self.config.input_dim}] but got "
                f"{list(visual_tokens.shape)}: they come from another vision tower or reduction than it was "
                "trained with."
            )
        positions = self.config.num_positions
        if positions and visual_tokens.shape[1] != positions:
            raise ValueError(
                f"The projector has {positions} position embeddings but each image has "
                f"{visual_tokens.shape[1]} visual tokens; use the num_image_tokens that it was trained with."
            )
        tokens = self.input_layer_norm(visual_tokens)
        if self.position_embeddings is not None:
            tokens = tokens + self.position_embeddings
        return self.network(tokens)


class _MlpProjector(nn.Module):
    """`num_layers` of Linear and LayerNorm with ReLU between: `[images, N, in]` to `[images, N, out]`."""

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int, num_layers: int) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_layers={num_layers} leaves no layer; set --num_layers to 1 or more.")
        sizes = [input_dim] + [hidden_dim] * (num_layers - 1) + [output_dim]
        self.layers = nn.ModuleList(nn.Linear(before, after) for before, after in pairwise(sizes))
        self.norms = nn.ModuleList(nn.LayerNorm(size) for size in sizes[1:])

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        for index, (layer, norm) in enumerate(zip(self.layers, self.norms, strict=True)):
            tokens = norm(layer(F.relu(tokens) if index else tokens))
        return tokens


class _CrossAttentionProjector(nn.Module):
    """Learned queries that attend to the projected tokens: `[images, N, in]` to `[images, num_tokens, out]`."""

    def __init__(
        self, input_dim: int, output_dim: int, num_tokens: int, num_layers: int, num_heads: int, feed_forward: bool
    ) -> None:
        super().__init__()
        _check_heads(output_dim, num_heads, "the UNet's cross_attention_dim")
        self.token_embeddings = nn.Parameter(torch.empty(1, num_tokens, output_dim))
        nn.init.normal_(self.token_embeddings, std=_QUERY_INIT_STD)
        self.proj = nn.Linear(input_dim, output_dim)
        self.input_norm = nn.LayerNorm(output_dim)
        self.cross_attn_layers = nn.ModuleList(
            _CrossAttentionLayer(output_dim, num_heads, feed_forward) for _ in range(num_layers)
        )

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        source = self.input_norm(self.proj(tokens))  # (images, N, out)
        queries = self.token_embeddings.expand(tokens.shape[0], -1, -1)  # (images, num_tokens, out)
        for layer in self.cross_attn_layers:
            queries = layer(queries, source)
        return queries


class _CrossAttentionLayer(nn.Module):
    """Post-norm cross-attention from `queries [images, Q, C]` to `source [images, N, C]`, optionally with an FFN."""

    def __init__(self, dim: int, num_heads: int, feed_forward: bool) -> None:
        super().__init__()
        self.cross_attn = nn.MultiheadAttention(dim, num_heads, batch_first=True)
        self.norm1 = nn.LayerNorm(dim)
        self.ffn = None
        if feed_forward:
            self.ffn = nn.Sequential(nn.Linear(dim, 4 * dim), nn.ReLU(), nn.Linear(4 * dim, dim))
            self.norm2 = nn.LayerNorm(dim)

    def forward(self, queries: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        attended, _ = self.cross_attn(queries, source, source, need_weights=False)
        queries = self.norm1(queries + attended)
        if self.ffn is not None:
            queries = self.norm2(queries + self.ffn(queries))
        return queries


class _TransformerProjector(nn.Module):
    """A pre-norm encoder over the tokens and a decoder over learned queries: `[images, num_tokens, out]`."""

    def __init__(
        self, input_dim: int, hidden_dim: int, output_dim: int, num_tokens: int, num_layers: int, num_heads: int
    ) -> None:
        super().__init__()
        _check_heads(hidden_dim, num_heads, "--hidden_dim")
        self.fc = nn.Linear(input_dim, hidden_dim)
        encoder_layer = nn.TransformerEncoderLayer(
            hidden_dim, num_heads, 4 * hidden_dim, dropout=0.0, norm_first=True, batch_first=True
        )
        self.tfm = nn.Transformer(
            d_model=hidden_dim,
            nhead=num_heads,
            num_decoder_layers=num_layers,
            dim_feedforward=4 * hidden_dim,
            dropout=0.0,
            norm_first=True,
            batch_first=True,
            # The default encoder, without nested tensors: pre-norm layers do not support them, and warn.
            custom_encoder=nn.TransformerEncoder(
                encoder_layer, num_layers, nn.LayerNorm(hidden_dim), enable_nested_tensor=False
            ),
        )
        self.query_embs = nn.Parameter(torch.empty(1, num_tokens, hidden_dim))
        nn.init.normal_(self.query_embs, std=_QUERY_INIT_STD)
        self.model = nn.Linear(hidden_dim, output_dim)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        queries = self.query_embs.expand(tokens.shape[0], -1, -1)
        return self.model(self.tfm(self.fc(tokens), queries))


def _check_heads(dim: int, num_heads: int, what: str) -> None:
    if num_heads < 1 or dim % num_heads:
        raise ValueError(
            f"num_heads={num_heads} does not divide {what} of {dim}; set --num_heads to a divisor of {dim}."
        )
