"""What several commands share: the device, images to open, drawing flags, tables."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from metamorph.flags.checks import check_model_reference, check_reachable
from metamorph.flags.parser import at_least, finite_number


if TYPE_CHECKING:
    import torch
    from PIL import Image

    from metamorph.visualization.pipeline import VisualizationPipeline


OUTPUT_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
"""What pictures are written as."""


def use_shipped(flags: argparse.Namespace) -> None:
    """Replace `mini` by the folder of the miniature that ships with the package.

    Args:
        flags: The command line; `model` and `visualizer` are changed.
    """
    from metamorph.mini import shipped_folder

    flags.model = shipped_folder(flags.model, "model")
    if flags.visualizer is not None:
        flags.visualizer = shipped_folder(flags.visualizer, "visualizer")


def open_pictures(paths: Sequence[str]) -> list[Image.Image]:
    """Open pictures as training does: upright, RGB, and read to the end.

    Args:
        paths: Picture files.

    Raises:
        ValueError: if one of them cannot be read; the message names it.
    """
    if not paths:
        return []
    from metamorph.data.media.stores import MediaError, load_image

    try:
        return [load_image(path) for path in paths]
    except MediaError as error:
        raise ValueError(f"--image {error}") from error


def check_picture_file(output: Path, *, overwrite: bool) -> None:
    """Refuse an `--output` that is not the name of a picture, or that is taken.

    Raises:
        ValueError: If it has another suffix, or is a file that exists, without `overwrite`.
    """
    if output.suffix.lower() not in OUTPUT_SUFFIXES:
        raise ValueError(f"--output {output} is not the name of a picture: end it in {', '.join(OUTPUT_SUFFIXES)}")
    if output.exists() and not overwrite:
        raise ValueError(f"--output {output} exists: give another name, or --overwrite")


def numbered(file: Path) -> Iterator[Path]:
    """The name of a file, then the same with `-2`, `-3`, … before its suffix."""
    yield file
    yield from (file.with_stem(f"{file.stem}-{number}") for number in itertools.count(2))


def choose_device(name: str | None) -> torch.device:
    """The device of `--device`, or the accelerator, or the CPU.

    Raises:
        ValueError: If there is no such device.
    """
    from metamorph.inference.session import pick_device

    return pick_device(name, flag="--device")


def print_table(rows: Sequence[dict]) -> None:
    """Print the result as a table; colours show floors that are reached or missed.

    Args:
        rows: As `metamorph.miniature.quickstart.report.headline` makes them.
    """
    from rich.console import Console
    from rich.table import Table

    styles = {"right": "green", "wrong": "red", "soft": ""}
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    table.add_column("n", justify="right")
    table.add_column("result", justify="right")
    table.add_column("floor")
    for row in rows:
        table.add_row(row["label"], str(row["n"]), row["value"], row["floor"], style=styles[row["mark"]])
    Console().print(table)


def add_drawing_flags(parser: argparse.ArgumentParser) -> None:
    """Define the flags that say what draws, and how.

    Args:
        parser: Of the command.
    """
    parser.add_argument("--visualizer", required=True, help="folder or Hub id of the visualizer, or mini")
    parser.add_argument(
        "--vision-tower",
        help="folder or Hub id of the tower, folder of the MetaMorph model, or mini (default: the one in the "
        "visualizer's folder, else the one it was trained with)",
    )
    parser.add_argument("--num-tokens", type=at_least(1), help="visual tokens per picture (default: as in training)")
    parser.add_argument(
        "--guidance-scale",
        type=at_least(0, finite_number),
        nargs="+",
        default=[1.0, 3.0],
        help="one or more, a column each (default: 1 3)",
    )
    parser.add_argument("--steps", type=at_least(1), default=20, help="denoising steps (default: %(default)s)")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the noise (default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda, …; by default the accelerator if there is one")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    parser.add_argument("--torch-compile", action="store_true", help="compile UNet, VAE decoder and projector")


def check_drawing_flags(flags: argparse.Namespace) -> None:
    """Replace `mini` by its folders, and check what needs no weights.

    Args:
        flags: The command line; `visualizer` and `vision_tower` are changed.

    Raises:
        ValueError: If diffusers is not installed.
        FileNotFoundError: If the visualizer does not exist.
    """
    import importlib.util

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
    """Check that a vision tower, or a model that contains one, is there; nothing is loaded.

    Args:
        name: Folder, Hub id, or a name of the training guide.
        flag: Flag that the error message names.

    Raises:
        FileNotFoundError: If it is not.
    """
    check_model_reference(name, flag)
    if not Path(name).is_dir():
        from metamorph.models.vision_tower import resolve_vision_tower  # imports PyTorch

        check_reachable(resolve_vision_tower(name), flag)


def open_pipeline(flags: argparse.Namespace) -> VisualizationPipeline:
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
