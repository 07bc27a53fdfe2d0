"""The model card of a visualizer: `README.md` with parts, data, recipe and the last log entry."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from metamorph.runs.cards import code, licences, render_card, shown, table, versions
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
    args: VisualizerArguments, pictures: int, num_processes: int, logged: Mapping[str, float]
) -> str:
    """The text of the card.

    Args:
        args: The flags, with the resolution that was trained.
        pictures: Number of training pictures, bad ones included.
        num_processes: Each of them took `batch_size` pictures at a time.
        logged: The values of the last log entry; empty if no step was done.
    """
    parts = {"diffusion model": args.pretrained_model_name_or_path, "vision tower": args.vision_tower}
    listed = "\n".join(f"- {part}: {code(shown(name))}" for part, name in parts.items())
    named = [code(shown(name)) for name in (*args.image_jsons, args.image_folder) if name is not None]
    source = f" from {', '.join(named)}" if named else ""
    bad = f", of which {logged['skipped_records']:g} could not be read" if logged.get("skipped_records") else ""
    sections = [
        "A visualizer for MetaMorph: it turns the visual tokens that a model writes into pixels. Trained from\n\n"
        f"{listed}\n\n```bash\nmetamorph generate --model MODEL --visualizer FOLDER --prompt 'Draw a red circle.' "
        "--output circle.png\nmetamorph visualize --image photo.jpg --visualizer FOLDER --output again.png\n```\n\n"
        "MODEL must have this vision tower and these token options: `mm_vision_select_layer` to `apply_softmax`.\n",
        f"## Data\n\n{pictures} pictures{source}{bad}.\n",
        table(
            "Recipe",
            "flag",
            "value",
            [
                *((name, getattr(args, name)) for name in RECIPE_FLAGS),
                ("num_processes", num_processes),
                *versions(*LIBRARIES),
            ],
        ),
        table(f"Metrics after {args.training_steps} steps", "metric", "last value", logged.items()),
        licences(args.model_license, args.data_license),
    ]
    return render_card(
        Path(args.output_dir).expanduser().resolve().name,
        sections,
        parts=parts.values(),
        license_name=args.model_license,
        tags=["metamorph", "vpit", "stable-diffusion"],
        pipeline_tag="image-to-image",
    )
