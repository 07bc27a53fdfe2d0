"""Which visual tokens a visualizer draws: its vision tower and how the tower's features become tokens."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from PIL import Image
from transformers import PreTrainedConfig

from metamorph.files.model_files import read_json_object
from metamorph.models.image_processing import load_image_processor
from metamorph.models.vision_tower import (
    MetaMorphConfig,
    VisionTower,
    load_tower_of,
    load_vision_config,
    load_vision_encoder,
    resolve_vision_tower,
)
from metamorph.visualization.encoder import VisualTokenEncoder
from metamorph.visualization.pixels import PixelFormat
from metamorph.visualizer_training.arguments import VisualizerArguments


logger = logging.getLogger(__name__)


def adopt_token_options(args: VisualizerArguments) -> VisualizerArguments:
    """The flags with the token options of the MetaMorph model, if `vision_tower` is the folder of one."""
    if not _is_metamorph(args.vision_tower):
        return args
    config = MetaMorphConfig.from_pretrained(_expanded(args.vision_tower))
    logger.info("Visual tokens as in the MetaMorph model %s: %d per image", args.vision_tower, config.num_image_tokens)
    return replace(
        args,
        mm_vision_select_layer=config.mm_vision_select_layer,
        num_tokens=config.num_image_tokens,
        image_token_reduction=config.image_token_reduction,
        normalize_vision=config.normalize_vision,
        apply_softmax=config.apply_softmax,
    )


def load_tower(args: VisualizerArguments) -> tuple[VisionTower, PixelFormat]:
    """Load the vision tower with the layer, reduction and normalisation of the MetaMorph model, and its format.

    Raises:
        ValueError: as `load_encoder`.
    """
    encoder = load_encoder(args)
    return encoder.tower, encoder.pixel_format


def load_encoder(args: VisualizerArguments) -> VisualTokenEncoder:
    """Load the vision tower, in float32, as a part of a pipeline.

    Raises:
        ValueError: if the tower is of an unknown kind, lacks weights, or does not fit the token options.
    """
    path = _expanded(resolve_vision_tower(args.vision_tower))
    try:
        if _is_metamorph(path):
            config = MetaMorphConfig.from_pretrained(path)
            tower = load_tower_of(path)
        else:
            config = _token_config(args, load_vision_config(path))
            tower = VisionTower(config, load_vision_encoder(path))
        processor = load_image_processor(path)
    except OSError as error:
        raise ValueError(f"--vision_tower {args.vision_tower} cannot be loaded: {error}") from error
    pixel_format = PixelFormat(
        size=config.vision_image_size,
        mean=tuple(processor.image_mean),
        std=tuple(processor.image_std),
        resample=Image.Resampling(processor.resample),
    )
    return VisualTokenEncoder.from_tower(tower, config, pixel_format)


def _token_config(args: VisualizerArguments, vision_config: PreTrainedConfig) -> MetaMorphConfig:
    """The configuration of a MetaMorph model with these token options."""
    if args.image_token_reduction == "mlpmixer":
        raise ValueError(
            "--image_token_reduction mlpmixer has weights of its own: give the folder of the MetaMorph model that "
            "holds them as --vision_tower"
        )
    return MetaMorphConfig(
        vision_config=vision_config,
        mm_vision_select_layer=args.mm_vision_select_layer,
        num_image_tokens=args.num_tokens,
        image_token_reduction=args.image_token_reduction,
        normalize_vision=args.normalize_vision,
        apply_softmax=args.apply_softmax,
    )


def _expanded(name: str) -> str:
    """A path in the home folder in full: recipes may hold `~`. Other paths and Hub ids as they are."""
    return str(Path(name).expanduser()) if name.startswith("~") else name


def _is_metamorph(name: str) -> bool:
    """Whether `name` is the local folder of a MetaMorph model."""
    file = Path(name).expanduser() / "config.json"
    return file.is_file() and read_json_object(file).get("model_type") == "metamorph"
