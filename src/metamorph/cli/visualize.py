"""`metamorph visualize --image FILE… --visualizer DIR`: image → visual tokens → image, without the language model."""

from collections.abc import Sequence
from pathlib import Path

from metamorph.cli.shared import (
    add_drawing_flags,
    check_drawing_flags,
    check_image_output,
    numbered,
    open_images,
    open_pipeline,
)
from metamorph.flags.parser import FlagParser, image_file, output_file


DEFAULT_OUTPUT = Path("visualized.png")


def main(argv: Sequence[str]) -> None:
    """Reconstruct images, write them next to the originals and print how similar they are."""
    parser = FlagParser(
        prog="metamorph visualize",
        description="Encode images with the vision tower and reconstruct them from their visual tokens, to see how "
        "good the visualizer is alone.",
    )
    parser.add_argument(
        "--image", required=True, type=image_file, nargs="+", action="extend", help="one or more image files"
    )
    add_drawing_flags(parser)
    output_help = f"image file with a row for each image (default: {DEFAULT_OUTPUT}, or the next free name)"
    parser.add_argument("--output", type=output_file, help=output_help)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    parser.add_argument("--drawings-only", action="store_true", help="leave the originals out of the output")
    flags = parser.parse_args(argv)
    check_drawing_flags(flags)
    if flags.output is not None:
        check_image_output(flags.output, overwrite=flags.overwrite)
    images = open_images(flags.image)
    pipeline = open_pipeline(flags)
    from metamorph.evaluation.visualizer import evaluate_visualizer
    from metamorph.inference.draw import SamplerSettings
    from metamorph.visualization.grids import image_grid

    scales = tuple(flags.guidance_scale)
    settings = SamplerSettings(scales, flags.steps, flags.seed, batch_size=16)
    found = evaluate_visualizer(pipeline, images, settings, keep=len(images))
    output = flags.output or next(file for file in numbered(DEFAULT_OUTPUT) if flags.overwrite or not file.exists())
    output.parent.mkdir(parents=True, exist_ok=True)
    if flags.drawings_only:
        rows = [found.drawn[start : start + len(scales)] for start in range(0, len(found.drawn), len(scales))]
        image_grid(rows, side=found.drawn[0].width).save(output)
    else:
        found.grid().save(output)
    for index, name in enumerate(flags.image):
        cosines = ", ".join(f"{score.cosine[index]:.3f} at scale {score.guidance_scale:g}" for score in found.scales)
        print(f"{name}: cosine of drawing and original {cosines}")
    print(f"drawn: {output}")
