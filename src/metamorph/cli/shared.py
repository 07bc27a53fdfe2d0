"""What several commands share: images, tables, and the flags that say how to load a model, answer and draw."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import logging
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metamorph.flags.checks import DEVICE_MAPS, check_model_reference, check_reachable
from metamorph.flags.parser import at_least, finite_number, positive_number


if TYPE_CHECKING:
    from PIL import Image

    from metamorph.inference.draw import SamplerSettings
    from metamorph.inference.sampling import Sampling
    from metamorph.inference.session import Session
    from metamorph.visualization.pipeline import VisualizationPipeline


logger = logging.getLogger(__name__)

OUTPUT_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
DTYPES = ("auto", "bfloat16", "float16", "float32")
DEVICE_HELP = "device such as cpu or cuda (default: the accelerator, if there is one)"


def open_images(paths: Sequence[str | Path], flag: str = "--image") -> list[Image.Image]:
    """Open images as training does: upright, RGB, and fully decoded; a `ValueError` names one that cannot be read."""
    if not paths:
        return []
    from metamorph.models.image_files import MediaError, load_image

    try:
        return [load_image(path) for path in paths]
    except MediaError as error:
        raise ValueError(f"{flag} {error}") from error


def check_image_output(output: Path, *, overwrite: bool) -> None:
    """Raise a `ValueError` if `--output` is not the name of an image, or exists and `overwrite` is False."""
    if output.suffix.lower() not in OUTPUT_SUFFIXES:
        raise ValueError(f"--output {output} is not the name of an image: end it in {', '.join(OUTPUT_SUFFIXES)}")
    if output.exists() and not overwrite:
        raise ValueError(f"--output {output} exists: give another name, or --overwrite")


def hide_loading_bars() -> None:
    """Disable the progress bars with which libraries load weights."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    if importlib.util.find_spec("diffusers"):
        from diffusers.utils import logging as diffusers_logging

        diffusers_logging.disable_progress_bar()


def add_answer_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say which model answers, how text is sampled, and how images are drawn."""
    model_help = "folder or Hub id of a trained MetaMorph model, or mini, the model that ships with MetaMorph"
    parser.add_argument("--model", required=True, help=model_help)
    parser.add_argument(
        "--visualizer", help="folder or Hub id of the visualizer, or mini; without it, images are not drawn"
    )
    limit_help = "limit on text and visual tokens (default: 256 and the tokens of one image)"
    parser.add_argument("--max-new-tokens", type=at_least(1), help=limit_help)
    not_negative = at_least(0, finite_number)
    parser.add_argument(
        "--temperature", type=not_negative, default=0.0, help="sampling temperature; 0 decodes greedily"
    )
    parser.add_argument("--top-p", type=not_negative, help="sample from the most likely tokens of this probability")
    parser.add_argument("--top-k", type=at_least(1), help="sample from this number of the most likely tokens")
    guidance_help = "guidance scales of the visualizer; each image is drawn with each, and 1 disables guidance"
    parser.add_argument("--guidance-scale", type=not_negative, nargs="+", default=[3.0], help=guidance_help)
    parser.add_argument("--num-images", type=at_least(1), default=1, help="drawings of each image, of successive seeds")
    parser.add_argument("--steps", type=at_least(1), default=20, help="denoising steps of the visualizer")
    parser.add_argument("--seed", type=at_least(0), default=0, help="random seed of sampling and of the first image")
    fps_help = "frames per second that the model sees of a video"
    parser.add_argument("--fps", type=positive_number, default=1.0, help=fps_help)
    parser.add_argument("--max-frames", type=at_least(1), default=8, help="most frames of a video")
    add_loading_flags(parser)


def check_answer_flags(flags: argparse.Namespace) -> tuple[Sampling, SamplerSettings]:
    """Return how to sample and draw, as the flags of `add_answer_flags` say; those without effect are refused."""
    from metamorph.inference.draw import SamplerSettings
    from metamorph.inference.sampling import Sampling

    for flag, value in (("--top-p", flags.top_p), ("--top-k", flags.top_k)):
        if value is not None and not flags.temperature:
            raise ValueError(f"{flag} {value} has no effect without --temperature, which is 0: the answer is greedy")
    if flags.top_p is not None and not 0 < flags.top_p <= 1:
        raise ValueError(f"--top-p {flags.top_p} must be above 0 and at most 1")
    if flags.num_images > 1 and flags.visualizer is None:
        raise ValueError(f"--num-images {flags.num_images} needs --visualizer, which draws the images")
    sampling = Sampling(
        flags.temperature, 1.0 if flags.top_p is None else flags.top_p, flags.top_k or 0, seed=flags.seed
    )
    return sampling, SamplerSettings(flags.guidance_scale, flags.steps, flags.seed, num_images=flags.num_images)


def open_answering_session(flags: argparse.Namespace) -> Session:
    """Load the model and visualizer; on a terminal the visualizer shows its progress."""
    from metamorph.inference.session import open_session

    hide_loading_bars()
    logger.info(
        "loading --model %s%s", flags.model, f" and --visualizer {flags.visualizer}" if flags.visualizer else ""
    )
    session = open_session(flags.model, flags.visualizer, **loading_options(flags))
    if session.pipeline is not None and sys.stderr.isatty():
        session.pipeline.set_progress_bar_config(disable=False, desc="drawing", leave=False)
    return session


def add_loading_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say where and in which precision a model is loaded; see [`loading_options`]."""
    group = parser.add_argument_group("loading")
    group.add_argument("--device", help=DEVICE_HELP)
    group.add_argument(
        "--device-map", choices=DEVICE_MAPS, help="spread the model over all devices, instead of --device"
    )
    group.add_argument("--dtype", choices=DTYPES, default="auto", help="dtype of the weights; auto is as saved")
    bits = group.add_mutually_exclusive_group()
    bits.add_argument("--load-in-4bit", action="store_true", help="quantise the language model to 4 bits")
    bits.add_argument("--load-in-8bit", action="store_true", help="quantise the language model to 8 bits")
    compile_help = "compile a step of generation, with a cache of a fixed size; the first answers take longer"
    group.add_argument("--torch-compile", action="store_true", help=compile_help)


def loading_dtype(flags: argparse.Namespace) -> str:
    """Precision of the model as in [`BatchDefaults`]: a dtype, `4bit` or `8bit`."""
    return "4bit" if flags.load_in_4bit else "8bit" if flags.load_in_8bit else flags.dtype


def loading_options(flags: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `open_session` for the flags of [`add_loading_flags`]."""
    import torch
    from transformers import BitsAndBytesConfig

    dtype = None if flags.dtype == "auto" else getattr(torch, flags.dtype)
    quantization = None
    if flags.load_in_4bit or flags.load_in_8bit:
        quantization = BitsAndBytesConfig(
            load_in_4bit=flags.load_in_4bit,
            load_in_8bit=flags.load_in_8bit,
            bnb_4bit_compute_dtype=dtype or torch.bfloat16,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
        )
    return {
        "device": flags.device,
        "dtype": dtype,
        "device_map": flags.device_map,
        "quantization_config": quantization,
        "torch_compile": flags.torch_compile,
        "flag_prefix": "--",
    }


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]], styles: Iterable[str] = ()) -> None:
    """Print a table whose first column is left-aligned; `styles` of rich are those of the rows, such as `green`."""
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    columns = (Column(name, justify="right" if number else "left") for number, name in enumerate(header))
    table = Table(*columns, box=None, pad_edge=False)
    for row, style in itertools.zip_longest(rows, styles, fillvalue=""):
        table.add_row(*map(Text, row), style=style)  # text, since names may contain rich's markup
    Console(width=200).print(table)  # never wraps a cell


def print_headline(metrics: dict[str, Any]) -> None:
    """Print the main table of metrics in the miniature world; colours show floors that are reached or missed."""
    from metamorph.miniature.quickstart.report import headline

    rows = headline(metrics)
    colors = {"right": "green", "wrong": "red", "soft": ""}
    values = ((row["label"], str(row["n"]), row["value"], row["floor"]) for row in rows)
    print_table(("", "n", "result", "floor"), values, (colors[row["mark"]] for row in rows))


def add_drawing_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say which visualizer draws, and how."""
    parser.add_argument("--visualizer", required=True, help="folder or Hub id of the visualizer, or mini")
    parser.add_argument(
        "--vision-tower",
        help="folder or Hub id of the vision tower or a MetaMorph model, or mini (default: the tower in the folder of "
        "the visualizer, else the one it was trained with)",
    )
    parser.add_argument("--num-tokens", type=at_least(1), help="visual tokens per image (default: as in training)")
    scale, scale_help = at_least(0, finite_number), "guidance scales; each image is drawn with each"
    parser.add_argument("--guidance-scale", type=scale, nargs="+", default=[1.0, 3.0], help=scale_help)
    parser.add_argument("--steps", type=at_least(1), default=20, help="denoising steps")
    parser.add_argument("--seed", type=at_least(0), default=0, help="random seed")
    parser.add_argument("--device", help=DEVICE_HELP)
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    parser.add_argument("--torch-compile", action="store_true", help="compile the UNet, VAE decoder and projector")


def check_drawing_flags(flags: argparse.Namespace) -> None:
    """Replace `mini` by its folders, and check diffusers, the visualizer and the tower without loading weights."""
    from metamorph.flags.extras import install_command
    from metamorph.mini import shipped_folder

    if importlib.util.find_spec("diffusers") is None:
        raise ValueError(f"--visualizer needs diffusers: {install_command('visualization')}")
    is_shipped = flags.visualizer == "mini" and not Path("mini").exists()
    if flags.vision_tower is not None or is_shipped:
        flags.vision_tower = shipped_folder(flags.vision_tower or "mini", "model")
    flags.visualizer = shipped_folder(flags.visualizer, "visualizer")
    check_reachable(flags.visualizer, flag="--visualizer", file="model_index.json")
    if flags.vision_tower is not None:
        check_tower_reference(flags.vision_tower, flag="--vision-tower")


def check_tower_reference(name: str, flag: str) -> None:
    """Raise a `FileNotFoundError` if a tower (folder, Hub id or name of the training guide) is not available."""
    check_model_reference(name, flag)
    if not Path(name).is_dir():
        from metamorph.models.vision_tower import resolve_vision_tower  # imports PyTorch

        check_reachable(resolve_vision_tower(name), flag)


def open_pipeline(flags: argparse.Namespace) -> VisualizationPipeline:
    """Load the visualizer with its tower as the flags, already checked, ask for."""
    import torch

    from metamorph.inference.session import pick_device
    from metamorph.visualization.loading import load_visualizer

    hide_loading_bars()
    dtype = torch.bfloat16 if flags.bf16 else torch.float32
    device = pick_device(flags.device, flag="--device")  # first: loading takes longer
    pipeline = load_visualizer(flags.visualizer, flags.vision_tower, flags.num_tokens, dtype).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.compile() if flags.torch_compile else pipeline
