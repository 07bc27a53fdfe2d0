"""`metamorph visualize --image FILE… --visualizer DIR`: a picture → visual tokens → a picture, without the model."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from metamorph.cli.generate import choose_device, open_pictures
from metamorph.flags.checks import check_model_reference, check_reachable


if TYPE_CHECKING:
    from metamorph.visualization.pipeline import VisualizationPipeline


OUTPUT_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
"""How the name of the output may end."""


def build_parser() -> argparse.ArgumentParser:
    """The flags of the command."""
    parser = argparse.ArgumentParser(
        prog="metamorph visualize",
        description="Encode pictures with the vision tower and draw them again from their visual tokens: how good the "
        "visualizer is alone.",
    )
    parser.add_argument("--image", required=True, nargs="+", action="extend", help="one or more picture files")
    add_drawing_flags(parser)
    parser.add_argument(
        "--output", default="visualized.png", help="picture file, with a row per picture (default: %(default)s)"
    )
    parser.add_argument(
        "--drawings_only", "--drawings-only", action="store_true", help="leave the originals out of the output"
    )
    return parser


def add_drawing_flags(parser: argparse.ArgumentParser) -> None:
    """Define the flags that say what draws, and how. Names of two words may be written with - or _.

    Args:
        parser: Of the command.
    """
    parser.add_argument("--visualizer", required=True, help="folder or Hub id of the visualizer, or mini")
    parser.add_argument(
        "--vision_tower",
        "--vision-tower",
        help="folder or Hub id of the tower, folder of the MetaMorph model, or mini (default: the one in the "
        "visualizer's folder, else the one it was trained with)",
    )
    parser.add_argument(
        "--num_tokens", "--num-tokens", type=int, help="visual tokens per picture (default: as in training)"
    )
    parser.add_argument(
        "--guidance_scale",
        "--guidance-scale",
        type=float,
        nargs="+",
        default=[1.0, 3.0],
        help="one or more, a column each (default: 1 3)",
    )
    parser.add_argument("--steps", type=int, default=20, help="denoising steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda, …; by default the accelerator if there is one")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    parser.add_argument(
        "--torch_compile", "--torch-compile", action="store_true", help="compile UNet, VAE decoder and projector"
    )


def main(argv: Sequence[str]) -> None:
    """Draw pictures again, write them side by side and print how alike they are.

    Args:
        argv: Command line after `visualize`.
    """
    flags = build_parser().parse_args(argv)
    check_drawing_flags(flags)
    _check_output(flags.output)
    missing = [path for path in flags.image if not Path(path).is_file()]
    if missing:
        raise FileNotFoundError(f"--image {missing[0]} does not exist")
    pictures = open_pictures(flags.image)
    pipeline = open_pipeline(flags)
    from metamorph.evaluation.visualizer import ReconstructionSettings, evaluate_visualizer
    from metamorph.visualization.grids import picture_grid

    scales = tuple(flags.guidance_scale)
    settings = ReconstructionSettings(scales, flags.steps, flags.seed, keep=len(pictures))
    found = evaluate_visualizer(pipeline, pictures, settings)
    output = Path(flags.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    if flags.drawings_only:
        rows = [found.drawn[start : start + len(scales)] for start in range(0, len(found.drawn), len(scales))]
        picture_grid(rows, side=found.drawn[0].width).save(output)
    else:
        found.grid().save(output)
    for index, name in enumerate(flags.image):
        cosines = ", ".join(f"{score.cosine[index]:.3f} at scale {score.guidance_scale:g}" for score in found.scales)
        print(f"{name}: cosine of drawing and original {cosines}")
    print(f"drawn: {output}")


def check_drawing_flags(flags: argparse.Namespace) -> None:
    """Replace `mini` by its folders, and check what needs no weights.

    Args:
        flags: The command line; `visualizer` and `vision_tower` are changed.

    Raises:
        ValueError: For a number that is not allowed, or if diffusers is not installed.
        FileNotFoundError: If the visualizer does not exist.
    """
    import importlib.util

    from metamorph.mini import AssetError, shipped_folder

    if importlib.util.find_spec("diffusers") is None:
        raise ValueError("--visualizer needs diffusers: pip install 'metamorph[visualization]'")
    for name, least in (("steps", 1), ("seed", 0), ("num_tokens", 1)):
        value = getattr(flags, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} {value} must be at least {least}")
    for scale in flags.guidance_scale:
        if not math.isfinite(scale):
            raise ValueError(f"--guidance_scale {scale} must be a finite number")
    try:
        is_shipped = flags.visualizer == "mini" and not Path("mini").exists()
        if flags.vision_tower is not None or is_shipped:
            flags.vision_tower = shipped_folder(flags.vision_tower or "mini", "model")
        flags.visualizer = shipped_folder(flags.visualizer, "visualizer")
    except AssetError as error:
        raise ValueError(f"--visualizer or --vision_tower: {error}") from error
    check_model_reference(flags.visualizer, flag="--visualizer", file="model_index.json")
    check_reachable(flags.visualizer, flag="--visualizer", file="model_index.json")


def _check_output(output: str) -> None:
    """Refuse a name that no picture can be written to, before one is drawn."""
    if Path(output).suffix.lower() not in OUTPUT_SUFFIXES or Path(output).is_dir():
        raise ValueError(f"--output {output} is no name of a picture file: let it end in {', '.join(OUTPUT_SUFFIXES)}")


def open_pipeline(flags: argparse.Namespace) -> "VisualizationPipeline":
    """The visualizer with its tower, where and as precise as the flags say.

    Args:
        flags: The command line, checked.
    """
    import torch
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    from metamorph.visualization.loading import load_visualizer

    diffusers_logging.disable_progress_bar()  # of loading weights: the output is the answer
    transformers_logging.disable_progress_bar()
    dtype = torch.bfloat16 if flags.bf16 else torch.float32
    device = choose_device(flags.device)  # first: loading takes longer
    pipeline = load_visualizer(flags.visualizer, flags.vision_tower, flags.num_tokens, dtype).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.compile() if flags.torch_compile else pipeline
