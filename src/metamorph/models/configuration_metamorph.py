"""Configuration of a MetaMorph model: two sub-configurations and every choice of VPiT, validated here."""

import math
import re
from typing import Any

from transformers import AutoConfig, PreTrainedConfig


TOKEN_REDUCTIONS = ("interpolation", "concat_interpolation", "mlpmixer", "none")
VISION_HEAD_TYPES = ("linear", "mlp", "mlp2x_gelu")
PROJECTOR_TYPES = ("linear", "mlp{N}x_gelu", "mlpsoftmax", "identity")
"""Values of `mm_projector_type`, with a number from 1 to 99 for `{N}`."""
MAX_IMAGE_TOKENS = 128**2
"""Most visual tokens per image. No weight depends on their number, so the files of a model do not bound it."""
MAX_IMAGE_SIDE = 4096
"""Largest side in pixels of the tower's input, for the same reason."""
CONCAT_BLOCK = 4
"""`concat_interpolation` joins blocks of 2×2 tokens along the feature axis."""


def check_options(options: Any) -> None:
    """Check the options that do not depend on the parts of the model; the error begins with name and value.

    `options` is a configuration, or the command-line arguments for one; a `vision_coef` of None is not decided yet.
    """
    reduction, count = options.image_token_reduction, options.num_image_tokens
    if reduction not in TOKEN_REDUCTIONS:
        raise ValueError(f"image_token_reduction={reduction!r} is unknown; use one of {TOKEN_REDUCTIONS}")
    projector = options.mm_projector_type
    if projector not in PROJECTOR_TYPES and re.fullmatch(r"mlp[1-9]\d?x_gelu", projector) is None:
        raise ValueError(f"mm_projector_type={projector!r} is unknown; use one of {PROJECTOR_TYPES}")
    if options.vision_head_type not in VISION_HEAD_TYPES:
        raise ValueError(f"vision_head_type={options.vision_head_type!r} is unknown; use one of {VISION_HEAD_TYPES}")
    coef = options.vision_coef
    if coef is not None and not (math.isfinite(coef) and coef >= 0):
        raise ValueError(f"vision_coef={coef} must be a finite number, 0 or larger")
    if not 1 <= count <= MAX_IMAGE_TOKENS:
        raise ValueError(f"num_image_tokens={count} must be from 1 to {MAX_IMAGE_TOKENS}")
    side = math.isqrt(count)
    if reduction in ("interpolation", "concat_interpolation") and side**2 != count:
        raise ValueError(
            f"num_image_tokens={count} is not a square number, which image_token_reduction={reduction!r} needs; the "
            f"nearest are {side**2} and {(side + 1) ** 2}"
        )


class MetaMorphConfig(PreTrainedConfig):
    """Configuration of [`MetaMorphForConditionalGeneration`].

    The fields are named like the flags of the training guide, so a trained folder documents its own command line.

    Args:
        text_config: configuration (or its dict) of any decoder-only language model. Defaults to `LlamaConfig()`.
        vision_config: configuration (or its dict) of a SigLIP, SigLIP 2, CLIP or DINOv2 vision model.
            Defaults to `SiglipVisionConfig()`.
        image_token_id: id of the placeholder of one visual token in `input_ids`; -1 (no token) until `from_parts`
            reads it from a tokenizer.
        image_start_token_id: id of `<image_start>`; None without `mm_use_im_start_end`.
        image_end_token_id: id of `<image_end>`; None without `mm_use_im_start_end`.
        num_image_tokens: visual tokens per image after reduction (`N`).
        image_token_reduction: one of `TOKEN_REDUCTIONS`.
        mm_vision_select_layer: index into the tower's `hidden_states`; -1 is the output of the last layer *before*
            the post layer norm.
        normalize_vision: divide every visual token, and every prediction of one, by its L2 norm.
        apply_softmax: turn every visual token into a distribution over its features, softmax(x / 0.07), and train the
            vision head with cross-entropy instead of the cosine loss.
        mm_projector_type: connector from vision features to the language model's hidden size.
        vision_head_type: head from the language model's hidden size to vision features.
        use_vision_ar: train on (and generate) visual tokens.
        vision_coef: weight of the visual loss.
        mm_use_im_start_end: wrap every image in `<image_start>` … `<image_end>`.
        mm_use_im_patch_token: spell the placeholder `<im_patch>` instead of `<image>`.
        version: name of the conversation template the model is trained with.
        lm_head_bias: whether the language model's head has a bias; `from_parts` reads it from the model.
    """

    model_type = "metamorph"
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}

    text_config: Any = None
    vision_config: Any = None
    image_token_id: int = -1
    image_start_token_id: int | None = None
    image_end_token_id: int | None = None
    num_image_tokens: int = 64
    image_token_reduction: str = "interpolation"
    mm_vision_select_layer: int = -1
    normalize_vision: bool = True
    apply_softmax: bool = False
    mm_projector_type: str = "mlp2x_gelu"
    vision_head_type: str = "mlp"
    use_vision_ar: bool = True
    vision_coef: float = 1.0
    mm_use_im_start_end: bool = True
    mm_use_im_patch_token: bool = False
    version: str = "llama3"
    lm_head_bias: bool = False
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.text_config = _sub_config(self.text_config, default="llama")
        self.vision_config = _sub_config(self.vision_config, default="siglip_vision_model")
        # Transformers ties `lm_head` to the embeddings by this field: the language model decides.
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        super().__post_init__(**kwargs)
        check_options(self)
        self._check_fit()

    @property
    def patch_grid(self) -> int:
        """Side of the tower's square patch grid (SigLIP-SO400M/14 at 384 pixels: 27)."""
        vision = self.vision_config
        if vision.model_type == "siglip2_vision_model":  # NaFlex has a patch budget instead of an image size
            return math.isqrt(vision.num_patches)
        return vision.image_size // vision.patch_size

    @property
    def vision_image_size(self) -> int:
        """Side in pixels of the square images the tower expects."""
        vision = self.vision_config
        is_naflex = vision.model_type == "siglip2_vision_model"
        return self.patch_grid * vision.patch_size if is_naflex else vision.image_size

    @property
    def vision_feature_size(self) -> int:
        """Features `D` of one visual token: input size of the connector, output size of the vision head."""
        hidden = self.vision_config.hidden_size
        return hidden * CONCAT_BLOCK if self.image_token_reduction == "concat_interpolation" else hidden

    def _check_fit(self) -> None:
        """Check the options against the two parts."""
        layers = self.vision_config.num_hidden_layers
        if not -layers - 1 <= self.mm_vision_select_layer <= layers:
            raise ValueError(
                f"mm_vision_select_layer={self.mm_vision_select_layer} does not exist: the vision tower has {layers} "
                f"layers, use {-layers - 1}..{layers} (0 is the embedding output)"
            )
        if self.mm_projector_type == "identity" and self.vision_feature_size != self.text_config.hidden_size:
            raise ValueError(
                f"mm_projector_type='identity' needs equal sizes, but a visual token has {self.vision_feature_size} "
                f"features and the language model {self.text_config.hidden_size}; use 'linear' or 'mlp2x_gelu'"
            )
        count, grid = self.num_image_tokens, self.patch_grid
        if self.image_token_reduction == "none" and count != grid**2:
            raise ValueError(
                f"num_image_tokens={count} disagrees with image_token_reduction='none': the vision tower gives "
                f"{grid}x{grid} = {grid**2} tokens; set num_image_tokens={grid**2} or reduce by 'interpolation'"
            )


def _sub_config(value: dict | PreTrainedConfig | None, default: str) -> PreTrainedConfig:
    if isinstance(value, PreTrainedConfig):
        return value
    fields = dict(value or {})
    return AutoConfig.for_model(fields.pop("model_type", default), **fields)


AutoConfig.register(MetaMorphConfig.model_type, MetaMorphConfig, exist_ok=True)
