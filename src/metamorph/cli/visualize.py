"""`metamorph visualize --image FILE… --visualizer DIR`: a picture → visual tokens → a picture, without the model."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from metamorph.cli.shared import (
    add_drawing_flags,
    check_drawing_flags,
    check_picture_file,
    numbered,
    open_pictures,
    open_pipeline,
)
from metamorph.flags.parser import FlagParser, image_file, output_file


DEFAULT_OUTPUT = Path("visualized.png")
"""How the name of the output may end."""


def build_parser() -> argparse.ArgumentParser:
    """The flags of the command."""
    parser = FlagParser(
        prog="metamorph visualize",
        description="Encode pictures with the vision tower and draw them again from their visual tokens: how good the "
        "visualizer is alone.",
    )
    parser.add_argument(
        "--image", required=True, type=image_file, nargs="+", action="extend", help="one or more picture files"
    )
    add_drawing_flags(parser)
    parser.add_argument(
        "--output",
        type=output_file,
        help=f"picture file, with a row per picture (default: {DEFAULT_OUTPUT}, or the next free name)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a file that exists")
    parser.add_argument("--drawings-only", action="store_true", help="leave the originals out of the output")
    return parser


def main(argv: Sequence[str]) -> None:
    """Draw pictures again, write them side by side and print how alike they are.

    Args:
        argv: Command line after `visualize`.
    """
    flags = build_parser().parse_args(argv)
    check_drawing_flags(flags)
    if flags.output is not None:
        check_picture_file(flags.output, overwrite=flags.overwrite)
    pictures = open_pictures(flags.image)
    pipeline = open_pipeline(flags)
    from metamorph.evaluation.visualizer import evaluate_visualizer
    from metamorph.inference.draw import SamplerSettings
    from metamorph.visualization.grids import picture_grid

    scales = tuple(flags.guidance_scale)
    settings = SamplerSettings(scales, flags.steps, flags.seed, batch_size=16)
    found = evaluate_visualizer(pipeline, pictures, settings, keep=len(pictures))
    output = flags.output or next(file for file in numbered(DEFAULT_OUTPUT) if flags.overwrite or not file.exists())
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
