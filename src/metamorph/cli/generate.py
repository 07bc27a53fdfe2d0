"""`metamorph generate --model DIR [--visualizer DIR] --prompt TEXT [--image FILE]…`: an answer in text and pictures."""

import argparse
import importlib.util
import itertools
import logging
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metamorph.cli.shared import check_picture_file, numbered, open_pictures, use_shipped
from metamorph.flags.checks import check_metamorph_model, names_flag, printable
from metamorph.flags.parser import FlagParser, at_least, finite_number, image_file, output_file
from metamorph.models.sequence.constants import DEFAULT_IMAGE_TOKEN


if TYPE_CHECKING:
    from PIL import Image


logger = logging.getLogger(__name__)

DEFAULT_OUTPUT = Path("generated.png")
PREVIEW_SIDE = 384
"""Width of the enlarged copy of a picture, in pixels."""
SMALL_SIDE = 256
"""Pictures narrower than this get an enlarged copy."""


def build_parser() -> argparse.ArgumentParser:
    """The flags of the command."""
    parser = FlagParser(prog="metamorph generate", description="Answer a prompt with text and pictures.")
    parser.add_argument(
        "--model",
        required=True,
        help="folder or Hub id of a trained MetaMorph model; mini is the one that ships with MetaMorph",
    )
    parser.add_argument("--visualizer", help="folder of the visualizer, or mini; without it pictures are only counted")
    parser.add_argument(
        "--prompt", required=True, help=f"the question; {DEFAULT_IMAGE_TOKEN} says where an --image belongs"
    )
    parser.add_argument(
        "--image", type=image_file, action="append", default=[], help="an input picture; may be given several times"
    )
    parser.add_argument("--draw", action="store_true", help="begin the answer with a picture, whatever the prompt")
    parser.add_argument(
        "--output",
        type=output_file,
        help=f"file of the picture; further ones get -2, -3, … (default: {DEFAULT_OUTPUT}, or the next free name)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace pictures that exist")
    parser.add_argument(
        "--max-new-tokens", type=at_least(1), help="text and visual tokens (default: 256, and those of one picture)"
    )
    parser.add_argument(
        "--temperature",
        type=at_least(0, finite_number),
        default=0.0,
        help="0: greedy, else sampling (default: %(default)s)",
    )
    parser.add_argument(
        "--guidance-scale",
        type=at_least(0, finite_number),
        default=3.0,
        help="of the visualizer; 1 is no guidance (default: %(default)s)",
    )
    parser.add_argument(
        "--steps", type=at_least(1), default=20, help="denoising steps of the visualizer (default: %(default)s)"
    )
    parser.add_argument("--seed", type=at_least(0), default=0, help="of sampling and of the visualizer's noise")
    parser.add_argument("--device", help="cpu, cuda, …; by default the accelerator if there is one")
    return parser


def main(argv: Sequence[str]) -> None:
    """Print the answer's text and write its pictures.

    Args:
        argv: Command line after `generate`.
    """
    flags = build_parser().parse_args(argv)
    use_shipped(flags)
    images = check_inputs(flags)
    import torch
    from transformers.utils import logging as transformers_logging

    from metamorph.inference import SamplerSettings, load
    from metamorph.models.sequence.conversations import TextPart

    transformers_logging.disable_progress_bar()  # of loading weights: the output is the answer
    if flags.visualizer is not None and importlib.util.find_spec("diffusers"):
        from diffusers.utils import logging as diffusers_logging

        diffusers_logging.disable_progress_bar()
    if flags.draw or flags.max_new_tokens is not None:
        check_budget(flags)
    session = load(flags.model, flags.visualizer, flags.device, dashes="--")
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
    written = []
    for image, file in zip(reply.images, save_images(reply.images, output, overwrite=flags.overwrite), strict=True):
        preview = save_preview(image, file, flags.prompt)
        written.append(str(file) if preview is None else f"{file}, enlarged: {preview}")
    names = iter(written)
    for part in reply.parts:
        print(
            printable(part.text)
            if isinstance(part, TextPart)
            else f"[picture: {next(names, 'not drawn without --visualizer')}]"
        )
    if not reply.num_images and (flags.visualizer is not None or flags.output is not None):
        logger.info("the answer has no picture, so none was drawn; --draw makes it begin with one")


def check_inputs(flags: argparse.Namespace) -> "list[Image.Image]":
    """Check everything that does not need weights, and open the pictures.

    Args:
        flags: The command line.
    """
    if not flags.prompt.strip():
        raise ValueError("--prompt is empty: say what the model should answer or draw")
    if flags.output is not None:
        if flags.visualizer is None:
            raise ValueError(f"--output {flags.output} needs --visualizer, which draws the pictures")
        for file in (flags.output, _preview_of(flags.output)):
            check_picture_file(file, overwrite=flags.overwrite)
    markers = flags.prompt.count(DEFAULT_IMAGE_TOKEN)
    if markers not in (0, len(flags.image)):
        raise ValueError(
            f"--prompt has {markers} {DEFAULT_IMAGE_TOKEN}, but there are {len(flags.image)} --image flags"
        )
    return open_pictures(flags.image)


def check_budget(flags: argparse.Namespace) -> None:
    """Compare `--max-new-tokens` with what a picture of the model takes, before its weights are loaded.

    Raises:
        ValueError: With `--draw`, if the model cannot draw or a picture does not fit.
    """
    from metamorph.models.pretrained import load_config

    check_metamorph_model(flags.model, flag="--model")
    with names_flag("--model", flags.model):
        config: Any = load_config(flags.model)
    can_draw = config.use_vision_ar and config.image_start_token_id is not None
    if flags.draw and not can_draw:
        raise ValueError(f"--draw: {flags.model} was trained without visual prediction, so it cannot draw")
    needed = config.num_image_tokens + 2
    if flags.max_new_tokens is None or flags.max_new_tokens >= needed or not can_draw:
        return
    message = (
        f"--max-new-tokens {flags.max_new_tokens} has no room for a picture, which takes {needed} "
        f"({config.num_image_tokens} visual tokens, <image_start> and <image_end>)"
    )
    if flags.draw:
        raise ValueError(f"{message}; --draw needs it: give {needed} or more, or leave it out")
    logger.warning("%s: the answer will be text only", message)


def save_images(images: "Sequence[Image.Image]", output: Path, *, overwrite: bool = False) -> list[Path]:
    """Write the images to `output` and, where there are several, to names with `-2`, `-3`, … before the suffix.

    Args:
        images: Any number.
        output: File of the first.
        overwrite: Replace files that exist. Otherwise their names are passed over.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    files = list(itertools.islice(_names(output, overwrite=overwrite), len(images)))
    for image, file in zip(images, files, strict=True):
        image.save(file)
    return files


def save_preview(image: "Image.Image", file: Path, caption: str) -> Path | None:
    """Write an enlarged copy of a small image, with a caption above it; None if the image is large enough.

    Args:
        image: The image.
        file: Where it has been written; the copy gets `-preview` before the suffix.
        caption: Cut where it is long.
    """
    if image.width >= SMALL_SIDE:
        return None
    from metamorph.visualization.grids import picture_grid

    label = textwrap.shorten(caption, width=60, placeholder=" …")
    preview = _preview_of(file)
    picture_grid([[image]], side=PREVIEW_SIDE, labels=[label]).save(preview)
    return preview


def _names(output: Path, *, overwrite: bool) -> Iterator[Path]:
    """`output`, then numbered ones; without `overwrite` only names that are free, with those of their copies."""
    for file in numbered(output):
        if overwrite or not (file.exists() or _preview_of(file).exists()):
            yield file


def _preview_of(file: Path) -> Path:
    return file.with_stem(f"{file.stem}-preview")
