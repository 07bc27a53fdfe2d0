"""The vision tower: frozen encoder, layer selection, token reduction, normalisation. Pixels in, visual tokens out."""

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from metamorph.flags.checks import errors_name_flag

from .configuration_metamorph import CONCAT_BLOCK, MetaMorphConfig
from .losses import SOFTMAX_TEMPERATURE
from .pretrained import load_checked, load_config


VISION_TOWER_ALIASES = {"siglip/CLIP-ViT-SO400M-14-384": "google/siglip-so400m-patch14-384"}
"""Name in the training guide -> Hub repository."""

TOWER_FIELDS = ("model_type", "hidden_size", "num_hidden_layers", "image_size", "patch_size")
"""Fields that tell architectures of towers apart."""

_PREFIX_TOKENS: dict[str, Callable[[PreTrainedConfig], int]] = {
    "siglip_vision_model": lambda config: 0,
    "siglip2_vision_model": lambda config: 0,
    "clip_vision_model": lambda config: 1,  # class token
    "dinov2": lambda config: 1,
    "dinov2_with_registers": lambda config: 1 + config.num_register_tokens,
}
"""Supported model types -> number of tokens before the patch tokens."""

_NOT_OF_THE_TOWER = (
    r"^(text_model|text_projection|visual_projection|classifier|head|vision_model\.head)\.|^logit_(scale|bias)$"
)
"""Weights of a tower's checkpoint that are not read: text half of CLIP and SigLIP, pooling and classification heads."""
_FINAL_NORMS = ("post_layernorm", "layernorm")
_LAYER_LISTS = ("encoder.layers", "encoder.layer")


def resolve_vision_tower(name: str) -> str:
    """Resolve an alias of the training guide to its Hub repository; other names and paths are returned unchanged."""
    return VISION_TOWER_ALIASES.get(name, name)


def load_vision_config(name_or_path: str, **hub_kwargs: object) -> PreTrainedConfig:
    """Load the vision configuration of a tower, or of a CLIP or SigLIP model, and check that it is supported."""
    config = load_config(resolve_vision_tower(name_or_path), **hub_kwargs)
    config = getattr(config, "vision_config", config)
    _num_prefix_tokens(config, f"--vision_tower {name_or_path!r}")
    return config


def check_same_tower(found: PreTrainedConfig, vision_tower: str, model: str) -> None:
    """Check that `--vision_tower` has the architecture of `found`, the tower in a finished model."""
    with errors_name_flag("--vision_tower", vision_tower):
        asked = load_vision_config(vision_tower)
    for name in TOWER_FIELDS:
        ours, theirs = getattr(asked, name, None), getattr(found, name, None)
        if ours != theirs:
            raise ValueError(
                f"--vision_tower {vision_tower} ({name} {ours}) contradicts the model {model}, which has a tower of "
                f"its own ({name} {theirs}): leave the flag out"
            )


def load_vision_encoder(name_or_path: str, dtype: torch.dtype = torch.float32, **hub_kwargs: object) -> PreTrainedModel:
    """Load a pretrained vision encoder, without its pooling head, and check that its weights are complete."""
    path = resolve_vision_tower(name_or_path)
    config = load_vision_config(name_or_path, **hub_kwargs)
    if hasattr(config, "vision_use_head"):
        config.vision_use_head = False  # the pooling head is never read
    build = partial(AutoModel.from_config, copy.deepcopy(config), trust_remote_code=False)
    load = partial(AutoModel.from_pretrained, config=config)
    return load_checked(load, path, config, build, _NOT_OF_THE_TOWER, dtype=dtype, **hub_kwargs)[0]


class VisionTower(nn.Module):
    """Turns images into visual tokens, by a loaded `encoder` that is cut in place, or one with random weights.

    Only the part of the encoder that computes the selected hidden state is kept: later layers, the final norm and
    pooling heads are removed, and DINOv2's mask token becomes a buffer. They would cost time and memory, and have no
    gradient when the tower is trained. The rest of the encoder is used as Transformers wrote it.
    """

    def __init__(self, config: MetaMorphConfig, encoder: PreTrainedModel | None = None):
        super().__init__()
        vision_config = config.vision_config
        self.num_prefix_tokens = _num_prefix_tokens(vision_config, "vision_config")
        self.encoder = encoder or AutoModel.from_config(vision_config, trust_remote_code=False)
        _cut_encoder(self.encoder, config.mm_vision_select_layer, vision_config.num_hidden_layers)
        self.reduction = TokenReduction(config)
        self.normalize, self.apply_softmax = config.normalize_vision, config.apply_softmax
        self.image_size = config.vision_image_size
        self.naflex_patch = vision_config.patch_size if vision_config.model_type == "siglip2_vision_model" else None

    def train(self, mode: bool = True) -> "VisionTower":
        """Set the mode of the reduction, and of the encoder only if it is trained.

        Dropout in a frozen encoder would make inputs and targets random: two encodings of one image would differ.
        """
        super().train(mode)
        if not self.is_trained:
            self.encoder.eval()
        return self

    @property
    def is_trained(self) -> bool:
        """Whether any weight of the encoder is trained."""
        return any(parameter.requires_grad for parameter in self.encoder.parameters())

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Encode, reduce and normalise images: [images, 3, height, width] -> [images, N, D] visual tokens.

        The images must be square, and of the tower's size. Gradients flow only into parts that require them.
        """
        if pixel_values.shape[-2:] != (self.image_size, self.image_size):
            height, width = pixel_values.shape[-2:]
            raise ValueError(
                f"pixel_values are {height}x{width}, but the vision tower expects {self.image_size}x{self.image_size}; "
                "prepare images with this model's own processor"
            )
        sharded = is_sharded(self.encoder)
        here, there = pixel_values.device, next(self.encoder.parameters()).device
        if not sharded and there.type == "cpu" != here.type:
            raise ValueError(
                f"pixel_values are on {here}, but the vision tower is on {there}: move them to one device. A run with "
                "--feature_cache keeps the tower in main memory, because its images are encoded already"
            )
        # Engines gather sharded weights here: gathered in inference mode, they could not be trained later.
        with nullcontext() if self.is_trained else torch.no_grad() if sharded else torch.inference_mode():
            patches = self._encode(pixel_values)  # (images, prefix + patches, hidden)
        if patches.is_inference():
            patches = patches.clone()  # autograd cannot save inference tensors for the backward pass
        patches = patches[:, self.num_prefix_tokens :]
        tokens = self.reduction(patches)
        return normalize_visual_tokens(tokens, normalize=self.normalize, apply_softmax=self.apply_softmax)

    def _encode(self, pixel_values: Tensor) -> Tensor:
        """[images, 3, H, W] -> [images, prefix + patches, hidden] of the selected layer."""
        pixel_values = pixel_values.to(self.encoder.dtype)
        if self.naflex_patch is None:  # all but SigLIP 2 NaFlex, which takes patches instead of images
            return self.encoder(pixel_values).last_hidden_state
        images, channels, height, width = pixel_values.shape
        size, rows, columns = self.naflex_patch, height // self.naflex_patch, width // self.naflex_patch
        patches = pixel_values.reshape(images, channels, rows, size, columns, size).permute(0, 2, 4, 3, 5, 1)
        return self.encoder(
            patches.reshape(images, rows * columns, size * size * channels),
            pixel_attention_mask=torch.ones(images, rows * columns, dtype=torch.long, device=patches.device),
            spatial_shapes=torch.tensor([[rows, columns]], device=patches.device).expand(images, 2),
        ).last_hidden_state


def _num_prefix_tokens(config: PreTrainedConfig, source: str) -> int:
    if config.model_type not in _PREFIX_TOKENS:
        raise ValueError(
            f"{source} has model type {config.model_type!r}, whose token layout is unknown; use a model of type "
            f"{', '.join(_PREFIX_TOKENS)} (or a CLIP/SigLIP model that contains one)"
        )
    return _PREFIX_TOKENS[config.model_type](config)


def is_sharded(module: nn.Module) -> bool:
    """Whether weights of `module` are sharded among ranks, by FSDP2 or ZeRO-3."""
    return any(hasattr(weight, "device_mesh") or hasattr(weight, "ds_id") for weight in module.parameters())


def normalize_visual_tokens(tokens: Tensor, *, normalize: bool, apply_softmax: bool) -> Tensor:
    """Bring [..., D] features, of the tower or of the vision head, into the scale of visual tokens, in float32.

    `normalize` divides each by its L2 norm (`normalize_vision`); `apply_softmax` then turns each into a distribution
    over features, softmax(x / τ) with τ = 0.07.
    """
    values = tokens.float()
    if normalize:
        values = F.normalize(values, dim=-1)
    if apply_softmax:
        values = torch.softmax(values / SOFTMAX_TEMPERATURE, dim=-1)
    return values.to(tokens.dtype)


class _ModelWithoutLanguage(PreTrainedModel):
    """A MetaMorph model with only the tower; its weights have the same names as in the full model."""

    config_class = MetaMorphConfig

    def __init__(self, config: MetaMorphConfig):
        super().__init__(config)
        self.model = nn.Module()
        self.model.vision_tower = VisionTower(config)
        self.post_init()


def load_tower_of(folder: str | Path) -> VisionTower:
    """Load only the vision tower of a finished MetaMorph model (folder or Hub repository), in float32."""
    config = load_config(folder, MetaMorphConfig)
    # Through Transformers: some towers (DINOv2) have other names in the files than in the modules.
    model, _ = load_checked(
        _ModelWithoutLanguage.from_pretrained,
        folder,
        config,
        lambda: _ModelWithoutLanguage(copy.deepcopy(config)),
        r"^(?!model\.vision_tower\.)",
        dtype=torch.float32,
    )
    return model.model.vision_tower


class TokenReduction(nn.Module):
    """Reduces the tower's patch tokens [images, patches, hidden] to [images, N, D].

    `interpolation` and `concat_interpolation` follow the original system. `mlpmixer` is the only reduction with
    weights, which are trained and saved together with the connector.
    """

    def __init__(self, config: MetaMorphConfig):
        super().__init__()
        self.method = config.image_token_reduction
        self.num_patches = config.patch_grid**2
        self.num_tokens = config.num_image_tokens
        if self.method == "mlpmixer":
            hidden = config.vision_config.hidden_size
            self.token_norm = nn.LayerNorm(hidden)
            self.token_mixer = nn.Sequential(
                nn.Linear(self.num_patches, self.num_tokens), nn.GELU(), nn.Linear(self.num_tokens, self.num_tokens)
            )
            self.channel_norm = nn.LayerNorm(hidden)
            self.channel_mixer = nn.Sequential(nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, hidden))

    def forward(self, patches: Tensor) -> Tensor:
        """[images, patches, hidden] -> [images, N, D]."""
        if patches.shape[1] != self.num_patches:
            raise ValueError(
                f"the vision tower gave {patches.shape[1]} patch tokens, its configuration promises {self.num_patches}"
            )
        if self.method == "none":
            return patches
        if self.method == "interpolation":
            return interpolate_tokens(patches, self.num_tokens)
        if self.method == "concat_interpolation":
            return concat_blocks(interpolate_tokens(patches, self.num_tokens * CONCAT_BLOCK))
        # (images, patches, hidden) -> (images, hidden, patches) -> (images, N, hidden)
        tokens = self.token_mixer(self.token_norm(patches).transpose(1, 2)).transpose(1, 2)
        return tokens + self.channel_mixer(self.channel_norm(tokens))


def interpolate_tokens(tokens: Tensor, count: int) -> Tensor:
    """Reduce a square token grid [images, side², hidden] to [images, count, hidden], bilinearly in float32."""
    images, patches, hidden = tokens.shape
    side, new_side = math.isqrt(patches), math.isqrt(count)
    grid = tokens.transpose(1, 2).reshape(images, hidden, side, side).float()  # (images, hidden, side, side)
    grid = F.interpolate(grid, size=(new_side, new_side), mode="bilinear", align_corners=False)
    return grid.flatten(2).transpose(1, 2).to(tokens.dtype)


def concat_blocks(tokens: Tensor) -> Tensor:
    """Join 2×2 blocks of a token grid along the features: [images, 4N, hidden] -> [images, N, 4·hidden].

    Within a block the order is top left, top right, bottom left, bottom right.
    """
    images, count, hidden = tokens.shape
    half = math.isqrt(count) // 2
    blocks = tokens.reshape(images, half, 2, half, 2, hidden).permute(0, 1, 3, 2, 4, 5)
    return blocks.reshape(images, half * half, CONCAT_BLOCK * hidden)


def _cut_encoder(encoder: PreTrainedModel, select_layer: int, num_layers: int) -> None:
    """Remove everything after hidden state `select_layer`, which `last_hidden_state` is then."""
    layers = next((module for name, module in encoder.named_modules() if name in _LAYER_LISTS), None)
    if layers is None:
        raise ValueError(f"{type(encoder).__name__} has none of the layer lists {_LAYER_LISTS}: unknown layout")
    del layers[select_layer if select_layer >= 0 else num_layers + 1 + select_layer :]
    for name in _FINAL_NORMS:
        if hasattr(encoder, name):
            setattr(encoder, name, nn.Identity())
    if getattr(encoder, "use_head", False):
        encoder.use_head = False
        del encoder.head
    # DINOv2's mask token replaces masked patches, and none are masked here. It keeps its name in checkpoints.
    for module in [module for module in encoder.modules() if "mask_token" in module._parameters]:
        token = module.mask_token
        del module.mask_token
        module.register_buffer("mask_token", None if token is None else token.detach())
