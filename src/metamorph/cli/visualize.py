"""`metamorph visualize --image FILE… --visualizer DIR`: image → visual tokens → image, without the language model.

With `--tokens FILE…`, the visual tokens of files that `metamorph generate` wrote without a visualizer.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from metamorph.cli.shared import (
    add_drawing_flags,
    check_drawing_flags,
    check_image_output,
    open_images,
    open_pipeline,
)
from metamorph.flags.parser import FlagParser, existing_file, image_file, output_file


DEFAULT_OUTPUT = Path("visualized.png")


def main(argv: Sequence[str]) -> None:
    """Reconstruct images, write them next to the originals and print how similar they are."""
    parser = FlagParser(
        prog="metamorph visualize",
        description="Encode images with the vision tower and reconstruct them from their visual tokens, to see how "
        "good the visualizer is alone.",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--image", type=image_file, nargs="+", action="extend", help="one or more image files")
    tokens_help = "draw the visual tokens of these files instead, which `metamorph generate` wrote without --visualizer"
    tokens_file = existing_file("a .safetensors file")
    source.add_argument("--tokens", type=tokens_file, nargs="+", action="extend", help=tokens_help)
    add_drawing_flags(parser)
    output_help = f"image file with a row for each image (default: {DEFAULT_OUTPUT}, or the next free name)"
    parser.add_argument("--output", type=output_file, help=output_help)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    parser.add_argument("--drawings-only", action="store_true", help="leave the originals out of the output")
    flags = parser.parse_args(argv)
    check_drawing_flags(flags)
    if flags.output is not None:
        check_image_output(flags.output, overwrite=flags.overwrite)
    if flags.tokens is not None:
        draw_tokens(flags)
        return
    images = open_images(flags.image)
    pipeline = open_pipeline(flags)
    from metamorph.evaluation.visualizer import evaluate_visualizer
    from metamorph.inference.draw import SamplerSettings
    from metamorph.visualization.grids import image_grid

    scales = tuple(flags.guidance_scale)
    settings = SamplerSettings(scales, flags.steps, flags.seed, batch_size=16)
    found = evaluate_visualizer(pipeline, images, settings, keep=len(images))
    output = output_of(flags)
    if flags.drawings_only:
        rows = [found.drawn[start : start + len(scales)] for start in range(0, len(found.drawn), len(scales))]
        image_grid(rows, side=found.drawn[0].width).save(output)
    else:
        found.grid().save(output)
    for index, name in enumerate(flags.image):
        cosines = ", ".join(f"{score.cosine[index]:.3f} at scale {score.guidance_scale:g}" for score in found.scales)
        print(f"{name}: cosine of drawing and original {cosines}")
    print(f"drawn: {output}")


def draw_tokens(flags: argparse.Namespace) -> None:
    """Draw visual tokens of files: a row for each image, a column for each guidance scale."""
    import torch

    from metamorph.inference.answer_files import contact_sheet, load_tokens
    from metamorph.inference.draw import SamplerSettings, draw_each
    from metamorph.models.processing_metamorph import ImagePart

    tokens = [image for file in flags.tokens for image in load_tokens(file)]
    pipeline = open_pipeline(flags)
    shape = tokens[0].shape if tokens else ()
    if any(each.shape != shape for each in tokens) or shape[-1:] != (pipeline.projector.config.input_dim,):
        raise ValueError(
            f"--tokens must all be of the model that --visualizer {flags.visualizer} was trained for, with "
            f"{pipeline.projector.config.input_dim} features; they are {sorted({tuple(each.shape) for each in tokens})}"
        )
    settings = SamplerSettings(tuple(flags.guidance_scale), flags.steps, flags.seed, batch_size=16)
    drawn = draw_each(pipeline, torch.stack(tokens), settings)
    parts = [ImagePart(each, images) for each, images in zip(tokens, drawn, strict=True)]
    output = output_of(flags)
    if len(parts) == len(settings.drawings) == 1:
        drawn[0][0].save(output)
    else:
        contact_sheet(parts, settings).save(output)
    print(f"drawn: {output}")


def output_of(flags: argparse.Namespace) -> Path:
    """The file to write, its folder created."""
    from metamorph.inference.answer_files import numbered

    output = flags.output or next(file for file in numbered(DEFAULT_OUTPUT) if flags.overwrite or not file.exists())
    output.parent.mkdir(parents=True, exist_ok=True)
    return output
