"""`metamorph generate --model DIR [--visualizer DIR] --prompt TEXT [--image FILE]…`: answer in text and images."""

import argparse
import itertools
import logging
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metamorph.cli.shared import (
    add_loading_flags,
    check_image_output,
    hide_loading_bars,
    loading_options,
    numbered,
    open_images,
)
from metamorph.flags.checks import check_metamorph_model, errors_name_flag, printable
from metamorph.flags.parser import FlagParser, at_least, finite_number, image_file, output_file
from metamorph.mini import shipped_folder
from metamorph.models.sequence.constants import DEFAULT_IMAGE_TOKEN


if TYPE_CHECKING:
    from PIL import Image


logger = logging.getLogger(__name__)

DEFAULT_OUTPUT = Path("generated.png")
PREVIEW_SIDE = 384
"""Width of the enlarged copy of an image, in pixels."""
SMALL_SIDE = 256
"""Images narrower than this get an enlarged copy."""


def build_parser() -> argparse.ArgumentParser:
    """The flags of the command."""
    parser = FlagParser(prog="metamorph generate", description="Answer a prompt with text and images.")
    model_help = "folder or Hub id of a trained MetaMorph model, or mini, the model that ships with MetaMorph"
    parser.add_argument("--model", required=True, help=model_help)
    parser.add_argument(
        "--visualizer", help="folder or Hub id of the visualizer, or mini; without it, images are not drawn"
    )
    parser.add_argument(
        "--prompt", required=True, help=f"text of the prompt, with {DEFAULT_IMAGE_TOKEN} where an --image belongs"
    )
    parser.add_argument(
        "--image", type=image_file, action="append", default=[], help="image of the prompt; may be repeated"
    )
    parser.add_argument("--draw", action="store_true", help="begin the answer with an image, whatever the prompt")
    output_help = f"file of the image; further ones get -2, -3, … (default: {DEFAULT_OUTPUT}, or the next free name)"
    parser.add_argument("--output", type=output_file, help=output_help)
    parser.add_argument("--overwrite", action="store_true", help="replace existing images")
    limit_help = "limit on text and visual tokens (default: 256 and the tokens of one image)"
    parser.add_argument("--max-new-tokens", type=at_least(1), help=limit_help)
    not_negative = at_least(0, finite_number)
    parser.add_argument(
        "--temperature", type=not_negative, default=0.0, help="sampling temperature; 0 decodes greedily"
    )
    guidance_help = "guidance scale of the visualizer; 1 disables guidance"
    parser.add_argument("--guidance-scale", type=not_negative, default=3.0, help=guidance_help)
    parser.add_argument("--steps", type=at_least(1), default=20, help="denoising steps of the visualizer")
    parser.add_argument("--seed", type=at_least(0), default=0, help="random seed")
    add_loading_flags(parser)
    return parser


def main(argv: Sequence[str]) -> None:
    """Print the text of the answer and write its images."""
    flags = build_parser().parse_args(argv)
    flags.model = shipped_folder(flags.model, "model")
    if flags.visualizer is not None:
        flags.visualizer = shipped_folder(flags.visualizer, "visualizer")
    images = check_inputs(flags)
    import torch

    from metamorph.inference import SamplerSettings
    from metamorph.inference.session import open_session
    from metamorph.models.sequence.conversations import TextPart

    hide_loading_bars()
    if flags.draw or flags.max_new_tokens is not None:
        check_budget(flags)
    session = open_session(flags.model, flags.visualizer, **loading_options(flags))
    torch.manual_seed(flags.seed)
    sampling = {"do_sample": True, "temperature": flags.temperature} if flags.temperature else {}
    reply = session.reply(
        flags.prompt,
        images,
        draw=flags.draw,
        settings=SamplerSettings(flags.guidance_scale, flags.steps, flags.seed),
        max_new_tokens=flags.max_new_tokens,
        **sampling,
    )
    output = DEFAULT_OUTPUT if flags.output is None else flags.output
    files = save_images(reply.images, output, overwrite=flags.overwrite)
    previews = [save_preview(image, file, flags.prompt) for image, file in zip(reply.images, files, strict=True)]
    names = map("".join, zip(map(str, files), previews, strict=True))
    for part in reply.parts:
        if isinstance(part, TextPart):
            print(printable(part.text))
        else:
            print(f"[image: {next(names, 'not drawn without --visualizer')}]")
    if not reply.num_images and (flags.visualizer is not None or flags.output is not None):
        logger.info("the answer has no image to draw; with --draw it begins with one")


def check_inputs(flags: argparse.Namespace) -> "list[Image.Image]":
    """Check everything that does not need weights, and open the images."""
    if not flags.prompt.strip():
        raise ValueError("--prompt is empty: say what the model should answer or draw")
    if flags.output is not None:
        if flags.visualizer is None:
            raise ValueError(f"--output {flags.output} needs --visualizer, which draws the images")
        for file in (flags.output, _preview_of(flags.output)):
            check_image_output(file, overwrite=flags.overwrite)
    markers = flags.prompt.count(DEFAULT_IMAGE_TOKEN)
    if markers not in (0, len(flags.image)):
        raise ValueError(
            f"--prompt has {markers} {DEFAULT_IMAGE_TOKEN}, but there are {len(flags.image)} --image flags"
        )
    return open_images(flags.image)


def check_budget(flags: argparse.Namespace) -> None:
    """Compare `--max-new-tokens` with the tokens of an image, before the weights of the model are loaded.

    With `--draw`, it is a `ValueError` if the model cannot draw or an image does not fit.
    """
    from metamorph.models.pretrained import load_config

    check_metamorph_model(flags.model, flag="--model")
    with errors_name_flag("--model", flags.model):
        config: Any = load_config(flags.model)
    can_draw = config.use_vision_ar and config.image_start_token_id is not None
    if flags.draw and not can_draw:
        raise ValueError(f"--draw: {flags.model} was trained without visual prediction, so it cannot draw")
    needed = config.num_image_tokens + 2
    if flags.max_new_tokens is None or flags.max_new_tokens >= needed or not can_draw:
        return
    message = (
        f"--max-new-tokens {flags.max_new_tokens} has no room for an image, which takes {needed} "
        f"({config.num_image_tokens} visual tokens, <image_start> and <image_end>)"
    )
    if flags.draw:
        raise ValueError(f"{message}; --draw needs it: give {needed} or more, or leave it out")
    logger.warning("%s: the answer will be text only", message)


def save_images(images: "Sequence[Image.Image]", output: Path, *, overwrite: bool = False) -> list[Path]:
    """Write the images to `output` and, if there are several, to names with `-2`, `-3`, … before the suffix.

    Names of existing images or previews are skipped unless `overwrite`.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    free = (file for file in numbered(output) if overwrite or not (file.exists() or _preview_of(file).exists()))
    files = list(itertools.islice(free, len(images)))
    for image, file in zip(images, files, strict=True):
        image.save(file)
    return files


def save_preview(image: "Image.Image", file: Path, caption: str) -> str:
    """Write an enlarged copy of a small image with a caption to `…-preview`; returns what to print about it."""
    if image.width >= SMALL_SIDE:
        return ""
    from metamorph.visualization.grids import image_grid

    label = textwrap.shorten(caption, width=60, placeholder=" …")
    preview = _preview_of(file)
    image_grid([[image]], side=PREVIEW_SIDE, labels=[label]).save(preview)
    return f", enlarged: {preview}"


def _preview_of(file: Path) -> Path:
    return file.with_stem(f"{file.stem}-preview")
