"""Load the parts of the visualizer: UNet, VAE and noise schedule of Stable Diffusion, and the projector.

Errors are a `ValueError` or `FileNotFoundError` that names the flag.
"""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel

from metamorph.flags.checks import check_reachable, errors_name_flag
from metamorph.models.vision_tower import resolve_vision_tower
from metamorph.visualization.folders import build_model, check_scheduler, load_model, local_folder, read_model_config
from metamorph.visualization.pipeline import vae_scale_factor
from metamorph.visualization.projector import VisualizationProjector
from metamorph.visualizer_training.arguments import VisualizerArguments


logger = logging.getLogger(__name__)

PREDICTION_TYPES = ("epsilon", "v_prediction")
_MAX_BLOCKS = 16


def check_folders(args: VisualizerArguments) -> None:
    """Refuse folders and Hub ids that do not fit their flag, before anything is loaded."""
    for flag, name, files, fix in (
        ("--vision_tower", args.vision_tower, ("config.json",), "a folder of a vision model"),
        (
            "--pretrained_model_name_or_path",
            args.pretrained_model_name_or_path,
            ("unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"),
            "a diffusers folder with the subfolders unet, vae and scheduler",
        ),
    ):
        folder = Path(name).expanduser()
        if folder.exists():
            if missing := [file for file in files if not (folder / file).is_file()]:
                raise ValueError(f"{flag} {name} lacks {', '.join(missing)}; give {fix}")
        elif name.startswith((".", "/", "~")):
            raise ValueError(f"{flag} {name} does not exist; give {fix}, or a Hub id")
        else:
            check_reachable(resolve_vision_tower(name), flag, files[0])


def load_diffusion_parts(
    args: VisualizerArguments, vae_dtype: torch.dtype = torch.float32
) -> tuple[UNet2DConditionModel, AutoencoderKL, DDPMScheduler]:
    """Load UNet (in float32), VAE and noise schedule from `pretrained_model_name_or_path`."""
    with errors_name_flag("--pretrained_model_name_or_path", args.pretrained_model_name_or_path):
        folder = _diffusion_folder(args)
        check_scheduler(DDPMScheduler, folder / "scheduler")
        scheduler = DDPMScheduler.from_pretrained(folder / "scheduler")
        if args.unet_from_scratch:
            unet = build_model(UNet2DConditionModel, folder / "unet")
        else:
            unet = load_model(UNet2DConditionModel, folder / "unet", args.variant, torch_dtype=torch.float32)
        vae = load_vae(args, vae_dtype)
        if unet.config.in_channels != vae.config.latent_channels:
            raise ValueError(
                f"the UNet takes {unet.config.in_channels} channels, the VAE has {vae.config.latent_channels}"
            )
        if not isinstance(unet.config.cross_attention_dim, int):
            raise ValueError(
                f"cross_attention_dim {unet.config.cross_attention_dim} differs between blocks of the UNet"
            )
        if scheduler.config.prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                f"prediction_type {scheduler.config.prediction_type!r} of the scheduler is not supported; use one of "
                f"{', '.join(PREDICTION_TYPES)}"
            )
    if args.resolution is not None:
        # The pipeline draws at the size in the UNet's configuration: make it the size that is trained.
        unet.register_to_config(sample_size=args.resolution // vae_scale_factor(vae.config))
    return unet, vae, scheduler


def load_vae(args: VisualizerArguments, dtype: torch.dtype) -> AutoencoderKL:
    """The VAE of `pretrained_model_name_or_path` in precision `dtype`."""
    return load_model(AutoencoderKL, _diffusion_folder(args) / "vae", args.variant, torch_dtype=dtype)


def adopt_resolution(args: VisualizerArguments) -> VisualizerArguments:
    """Return the flags with a resolution that the diffusion model can draw, by default its own; reads no weights."""
    name = args.pretrained_model_name_or_path
    with errors_name_flag("--pretrained_model_name_or_path", name):
        folder = _diffusion_folder(args)
        unet = read_model_config(UNet2DConditionModel, folder / "unet")
        vae = read_model_config(AutoencoderKL, folder / "vae")
        blocks = [_blocks(config, folder / part / "config.json") for part, config in (("unet", unet), ("vae", vae))]
    factor = vae_scale_factor(vae)
    sample_size = unet.get("sample_size")
    native = sample_size * factor if isinstance(sample_size, int) else None
    resolution = native if args.resolution is None else args.resolution
    if resolution is None:
        raise ValueError(
            f"--pretrained_model_name_or_path {name} does not state one resolution (sample_size {sample_size} of its "
            "UNet): give --resolution"
        )
    multiple = factor * 2 ** (blocks[0] - 1)
    if resolution % multiple:
        raise ValueError(f"--resolution {resolution} must be a multiple of {multiple} for this VAE and UNet")
    if args.resolution is None:
        logger.info("--resolution %d, as %s was trained", resolution, name)
    elif native not in (None, resolution):
        logger.warning("--resolution %d differs from the %d that %s was trained at", resolution, native, name)
    return replace(args, resolution=resolution)


def build_projector(
    args: VisualizerArguments, tokens: tuple[int, int], cross_attention_dim: int
) -> VisualizationProjector:
    """The projector to train, new or from `pretrained_projector`; `tokens` are the number and size of visual tokens."""
    num_tokens, feature_size = tokens
    if args.pretrained_projector is None:
        return VisualizationProjector(
            input_dim=feature_size,
            hidden_dim=args.hidden_dim,
            output_dim=cross_attention_dim,
            num_tokens=args.num_query_tokens,
            num_layers=args.num_layers,
            num_heads=args.num_heads,
            mode=args.mode,
            normalize_input=args.normalize_input,
            num_positions=num_tokens if args.learn_positions else 0,
        )
    folder = Path(args.pretrained_projector).expanduser()
    folder = folder / "projector" if (folder / "projector").is_dir() else folder
    if not (folder / "config.json").is_file():
        raise ValueError(f"--pretrained_projector {args.pretrained_projector} holds no projector (config.json)")
    with errors_name_flag("--pretrained_projector", args.pretrained_projector):
        projector = load_model(VisualizationProjector, folder)
    sizes = (projector.config.input_dim, projector.config.output_dim)
    if sizes != (feature_size, cross_attention_dim):
        raise ValueError(
            f"--pretrained_projector {args.pretrained_projector} maps {sizes[0]} to {sizes[1]} features, but the "
            f"vision tower gives {feature_size} and the UNet takes {cross_attention_dim}"
        )
    logger.info("Starting from the %s projector in %s", projector.config.mode, folder)
    return projector


def _blocks(config: dict[str, Any], file: Path) -> int:
    """Number of blocks of a UNet or VAE; all but the last halve the sides."""
    channels = config.get("block_out_channels")
    if not isinstance(channels, list) or not 0 < len(channels) <= _MAX_BLOCKS:
        raise ValueError(f"{file}: block_out_channels {channels!r} must be a list of 1 to {_MAX_BLOCKS} numbers")
    return len(channels)


def _diffusion_folder(args: VisualizerArguments) -> Path:
    return local_folder(
        args.pretrained_model_name_or_path, ("unet", "vae", "scheduler"), args.variant, revision=args.revision
    )
