"""The model card of a visualizer: `README.md` with parts, data, recipe and the last log entry."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from metamorph.runs.cards import render_card
from metamorph.visualizer_training.arguments import VisualizerArguments


RECIPE_FLAGS = (
    *("mm_vision_select_layer", "num_tokens", "image_token_reduction", "normalize_vision", "apply_softmax"),
    *("mode", "num_query_tokens", "hidden_dim", "num_layers", "num_heads", "normalize_input", "learn_positions"),
    *("unfreeze_unet", "unet_from_scratch", "resolution", "random_crop", "training_steps", "batch_size"),
    *("gradient_accumulation_steps", "lr", "unet_lr", "lr_scheduler", "warmup_steps", "weight_decay", "max_grad_norm"),
    *("ema_decay", "mixed_precision", "cfg_prob", "timestep_power", "noise_offset", "snr_gamma", "seed"),
)
LIBRARIES = ("torch", "diffusers", "transformers", "accelerate")


def render_visualizer_card(
    args: VisualizerArguments, num_images: int, num_processes: int, logged: Mapping[str, float]
) -> str:
    """The text of the card.

    Args:
        args: The flags, with the resolution that was trained.
        num_images: Number of training images, including bad ones.
        num_processes: Each of them took `batch_size` images at a time.
        logged: The values of the last log entry; empty if no step was done.
    """
    return render_card(
        "visualizer_card.md.jinja",
        Path(args.output_dir).expanduser().resolve().name,
        parts={"diffusion model": args.pretrained_model_name_or_path, "vision tower": args.vision_tower},
        recipe={name: getattr(args, name) for name in RECIPE_FLAGS} | {"num_processes": num_processes},
        libraries=LIBRARIES,
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
