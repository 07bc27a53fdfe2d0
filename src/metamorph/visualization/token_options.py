"""Which visual tokens a visualizer draws: its vision tower and how the tower's features become tokens."""

import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from PIL import Image

from metamorph.files.model_files import read_json_object
from metamorph.flags.checks import errors_name_flag
from metamorph.models.image_processing import load_image_processor
from metamorph.models.vision_tower import (
    MetaMorphConfig,
    VisionTower,
    load_config,
    load_tower_of,
    load_vision_config,
    load_vision_encoder,
    resolve_vision_tower,
)
from metamorph.visualization.encoder import TOKEN_FIELDS, VisualTokenEncoder
from metamorph.visualization.pixels import PixelFormat


logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class TokenOptions:
    """Which tower makes the visual tokens of an image, and how: names and defaults are those of `metamorph train`."""

    vision_tower: str = "siglip/CLIP-ViT-SO400M-14-384"
    """Vision encoder whose tokens are drawn: the folder or Hub id that the MetaMorph model was trained with, or the
    folder of the finished MetaMorph model. The latter's tower and token options override the five flags below."""
    mm_vision_select_layer: int = -1
    """Hidden state of the tower that becomes visual tokens, as in `metamorph train`."""
    num_tokens: int = 64
    """Visual tokens per image: `num_image_tokens` of `metamorph train`."""
    image_token_reduction: str = "interpolation"
    """How the tower's patches become num_tokens tokens, as in `metamorph train`."""
    normalize_vision: bool = True
    """Divide every visual token by its L2 norm, as in `metamorph train`."""
    apply_softmax: bool = False
    """Make every visual token a distribution over its features, as in `metamorph train`."""


Options = TypeVar("Options", bound=TokenOptions)


def adopt_token_options(options: Options) -> Options:
    """The options of the MetaMorph model, if `vision_tower` is the folder of one; else `options` unchanged."""
    if not _is_metamorph(options.vision_tower):
        return options
    config = load_config(os.path.expanduser(options.vision_tower), MetaMorphConfig)
    logger.info(
        "Visual tokens as in the MetaMorph model %s: %d per image", options.vision_tower, config.num_image_tokens
    )
    fields = {name: getattr(config, name) for name in TOKEN_FIELDS}
    return replace(options, num_tokens=config.num_image_tokens, **fields)


def load_encoder(options: TokenOptions) -> VisualTokenEncoder:
    """Load the vision tower in float32, with the layer, reduction and normalisation of the MetaMorph model."""
    path = os.path.expanduser(resolve_vision_tower(options.vision_tower))
    with errors_name_flag("--vision_tower", options.vision_tower):
        if _is_metamorph(path):
            config = load_config(path, MetaMorphConfig)
            tower = load_tower_of(path)
        else:
            if options.image_token_reduction == "mlpmixer":
                raise ValueError(
                    "--image_token_reduction mlpmixer has trained weights: give the folder of the MetaMorph model that "
                    "holds them as --vision_tower"
                )
            config = MetaMorphConfig(
                vision_config=load_vision_config(path),
                num_image_tokens=options.num_tokens,
                **{name: getattr(options, name) for name in TOKEN_FIELDS},
            )
            tower = VisionTower(config, load_vision_encoder(path))
        processor = load_image_processor(path)
    pixel_format = PixelFormat(
        size=config.vision_image_size,
        mean=tuple(processor.image_mean),
        std=tuple(processor.image_std),
        resample=Image.Resampling(processor.resample),
    )
    return VisualTokenEncoder.from_tower(tower, config, pixel_format)


def _is_metamorph(name: str) -> bool:
    """Whether `name` is the local folder of a MetaMorph model."""
    file = Path(name).expanduser() / "config.json"
    return file.is_file() and read_json_object(file).get("model_type") == "metamorph"
