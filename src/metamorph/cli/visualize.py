"""`metamorph visualize --image FILE… --visualizer DIR`: a picture → visual tokens → a picture, without the model."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from metamorph.cli.shared import add_drawing_flags, check_drawing_flags, open_pictures, open_pipeline
from metamorph.flags.parser import FlagParser, image_file, output_file


OUTPUT_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
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
        default=Path("visualized.png"),
        help="picture file, with a row per picture (default: %(default)s)",
    )
    parser.add_argument("--drawings-only", action="store_true", help="leave the originals out of the output")
    return parser


def main(argv: Sequence[str]) -> None:
    """Draw pictures again, write them side by side and print how alike they are.

    Args:
        argv: Command line after `visualize`.
    """
    flags = build_parser().parse_args(argv)
    check_drawing_flags(flags)
    _check_output(flags.output)
    pictures = open_pictures(flags.image)
    pipeline = open_pipeline(flags)
    from metamorph.evaluation.visualizer import ReconstructionSettings, evaluate_visualizer
    from metamorph.visualization.grids import picture_grid

    scales = tuple(flags.guidance_scale)
    settings = ReconstructionSettings(scales, flags.steps, flags.seed, keep=len(pictures))
    found = evaluate_visualizer(pipeline, pictures, settings)
    output = flags.output
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


def _check_output(output: Path) -> None:
    """Refuse a name that no picture can be written to, before one is drawn."""
    if output.suffix.lower() not in OUTPUT_SUFFIXES:
        raise ValueError(f"--output {output} is no name of a picture file: let it end in {', '.join(OUTPUT_SUFFIXES)}")
