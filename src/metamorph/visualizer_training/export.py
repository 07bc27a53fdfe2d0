"""Results of training: the pipeline folder with its model card, and grids of validation images."""

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from PIL import Image

from metamorph.files.permissions import apply_umask
from metamorph.inference.draw import SamplerSettings, draw
from metamorph.runs.cards import CARD_FILE, render_card
from metamorph.visualization.folders import ARGUMENTS_FILE, INDEX_FILE
from metamorph.visualization.grids import reconstruction_grid
from metamorph.visualization.pipeline import VisualizationPipeline
from metamorph.visualization.pixels import crop_square
from metamorph.visualization.token_options import load_encoder
from metamorph.visualizer_training.arguments import VisualizerArguments
from metamorph.visualizer_training.build import load_vae
from metamorph.visualizer_training.denoising import Denoiser, FrozenEncoders


_VALIDATION_STEPS = 20
_CARD_FLAGS = (
    *("mm_vision_select_layer", "num_tokens", "image_token_reduction", "normalize_vision", "apply_softmax"),
    *("mode", "num_query_tokens", "hidden_dim", "num_layers", "num_heads", "normalize_input", "learn_positions"),
    *("unfreeze_unet", "unet_from_scratch", "resolution", "random_crop", "training_steps", "batch_size"),
    *("gradient_accumulation_steps", "lr", "unet_lr", "lr_scheduler", "warmup_steps", "weight_decay", "max_grad_norm"),
    *("ema_decay", "mixed_precision", "cfg_prob", "timestep_power", "noise_offset", "snr_gamma", "seed"),
)


def save_pipeline(output_dir: Path, model: Denoiser, vae: AutoencoderKL, args: VisualizerArguments, card: str) -> None:
    """Write a `VisualizationPipeline`, its flags and its model card into `output_dir`, which may hold checkpoints."""
    # Frozen parts are saved with the weights they were loaded with, not as training cast them.
    vae = vae if vae.dtype == torch.float32 else load_vae(args, torch.float32)
    tower = load_encoder(args) if args.save_vision_tower else None
    pipeline = VisualizationPipeline.from_parts(model.projector, model.unet, vae, model.noise_scheduler, tower)
    output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir, prefix=".partial-") as partial:
        pipeline.save_pretrained(partial)
        apply_umask(*Path(partial).rglob("*.safetensors"))
        text = json.dumps(args.to_dict(), indent=2) + "\n"
        (Path(partial) / ARGUMENTS_FILE).write_text(text, encoding="utf-8")
        (Path(partial) / CARD_FILE).write_text(card, encoding="utf-8")
        # A folder does not load without the index. It is removed first and written last: what loads is complete.
        (output_dir / INDEX_FILE).unlink(missing_ok=True)
        for path in sorted(Path(partial).iterdir(), key=lambda path: path.name == INDEX_FILE):
            target = output_dir / path.name
            if target.is_dir():
                shutil.rmtree(target)
            path.replace(target)


def render_visualizer_card(
    args: VisualizerArguments, num_images: int, num_processes: int, logged: Mapping[str, float]
) -> str:
    """Render the model card; `num_images` includes bad ones, and `logged` is the last log entry, or empty."""
    return render_card(
        "visualizer_card.md.jinja",
        Path(str(args.output_dir)).expanduser().resolve().name,
        parts={"diffusion model": args.pretrained_model_name_or_path, "vision tower": args.vision_tower},
        recipe={name: getattr(args, name) for name in _CARD_FLAGS} | {"num_processes": num_processes},
        libraries=("torch", "diffusers", "transformers", "accelerate"),
        model_license=args.model_license,
        data_license=args.data_license,
        tags=["metamorph", "vpit", "stable-diffusion"],
        pipeline_tag="image-to-image",
        num_images=num_images,
        num_bad=int(logged.get("skipped_records", 0)),
        sources=[name for name in (*args.image_jsons, args.image_folder) if name is not None],
        steps=args.training_steps,
        metrics=logged,
    )


def draw_validation_grid(
    model: Denoiser, encoders: FrozenEncoders, images: Sequence[Image.Image], args: VisualizerArguments
) -> Image.Image:
    """Draw the central squares of images again from their tokens: a row per image, one column per guidance scale."""
    settings = SamplerSettings(args.validation_guidance_scales, _VALIDATION_STEPS, args.seed)
    training = model.projector.training
    pipeline = VisualizationPipeline.from_parts(model.projector.eval(), model.unet, encoders.vae, model.noise_scheduler)
    try:
        drawn = draw(pipeline, encoders.tower.encode_images(images), settings)
    finally:
        model.projector.train(training)
    originals = [crop_square(image).resize(drawn[0].size, Image.Resampling.BICUBIC) for image in images]
    return reconstruction_grid(originals, drawn, args.validation_guidance_scales, side=drawn[0].width)
