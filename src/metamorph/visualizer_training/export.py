"""What training leaves: the pipeline folder, and grids of validation pictures."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from metamorph.files.permissions import apply_umask
from metamorph.inference.draw import SamplerSettings, draw
from metamorph.runs.cards import CARD_FILE
from metamorph.visualization.folders import ARGUMENTS_FILE, INDEX_FILE
from metamorph.visualization.grids import reconstruction_grid
from metamorph.visualization.pipeline import VisualizationPipeline
from metamorph.visualization.pixels import PixelFormat, crop_square
from metamorph.visualization.projector import VisualizationProjector
from metamorph.visualization.token_options import load_encoder
from metamorph.visualizer_training.arguments import VisualizerArguments
from metamorph.visualizer_training.build import DiffusionParts, load_vae
from metamorph.visualizer_training.denoising import FrozenEncoders


_VALIDATION_STEPS = 20


def save_pipeline(
    output_dir: Path, projector: VisualizationProjector, parts: DiffusionParts, args: VisualizerArguments, card: str
) -> None:
    """Write a `VisualizationPipeline` into `output_dir`, which may hold checkpoints too.

    Args:
        output_dir: Folder of the result.
        projector: The trained projector.
        parts: UNet, VAE and noise schedule.
        args: The flags, kept beside the pipeline.
        card: Text of the model card.
    """
    # Frozen parts are passed on as they came, not as training cast them.
    vae = parts.vae if parts.vae.dtype == torch.float32 else load_vae(args, torch.float32)
    tower = load_encoder(args) if args.save_vision_tower else None
    pipeline = VisualizationPipeline.from_parts(projector, parts.unet, vae, parts.noise_scheduler, tower)
    output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir, prefix=".partial-") as partial:
        pipeline.save_pretrained(partial)
        apply_umask(*Path(partial).rglob("*.safetensors"))
        text = json.dumps(args.to_dict(), indent=2) + "\n"
        (Path(partial) / ARGUMENTS_FILE).write_text(text, encoding="utf-8")
        (Path(partial) / CARD_FILE).write_text(card, encoding="utf-8")
        # Without the index a folder does not load. It goes first and comes last, so what loads is complete.
        (output_dir / INDEX_FILE).unlink(missing_ok=True)
        for path in sorted(Path(partial).iterdir(), key=lambda path: path.name == INDEX_FILE):
            target = output_dir / path.name
            if target.is_dir():
                shutil.rmtree(target)
            path.replace(target)


@torch.no_grad()
def draw_validation_grid(
    projector: VisualizationProjector,
    parts: DiffusionParts,
    encoders: FrozenEncoders,
    images: Sequence[Image.Image],
    tower_format: PixelFormat,
    args: VisualizerArguments,
) -> Image.Image:
    """Draw pictures again from their visual tokens.

    Args:
        projector: The projector as trained so far.
        parts: UNet, VAE and noise schedule.
        encoders: Their vision tower makes the tokens.
        images: Pictures of any size; their central square is used.
        tower_format: What the tower takes.
        args: Guidance scales and seed.

    Returns:
        One row per picture: the original, then one drawing per guidance scale.
    """
    squares = [crop_square(image) for image in images]
    pixels = torch.stack([tower_format.pixels(square) for square in squares]).to(parts.unet.device)
    tokens = encoders.tower(pixels).float()
    training = projector.training
    pipeline = VisualizationPipeline.from_parts(projector.eval(), parts.unet, parts.vae, parts.noise_scheduler)
    try:
        drawn = draw(pipeline, tokens, SamplerSettings(args.validation_guidance_scales, _VALIDATION_STEPS, args.seed))
    finally:
        projector.train(training)

    originals = [square.resize((parts.resolution,) * 2, Image.Resampling.BICUBIC) for square in squares]
    return reconstruction_grid(originals, drawn, args.validation_guidance_scales, side=parts.resolution)
