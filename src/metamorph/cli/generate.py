"""`metamorph generate --model DIR [--visualizer DIR] --prompt TEXT [--image FILE]…`: an answer in text and pictures."""

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from metamorph.cli.shared import open_pictures, use_shipped
from metamorph.flags.checks import printable
from metamorph.flags.parser import FlagParser
from metamorph.models.sequence.constants import DEFAULT_IMAGE_TOKEN


if TYPE_CHECKING:
    from PIL import Image


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
    parser.add_argument("--image", action="append", default=[], help="an input picture; may be given several times")
    parser.add_argument("--output", default="generated.png", help="where pictures go; a second one becomes …-2.png")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="text and visual tokens (default: %(default)s)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0: greedy, else sampling (default: %(default)s)"
    )
    parser.add_argument("--guidance-scale", type=float, default=3.0, help="of the visualizer (default: %(default)s)")
    parser.add_argument(
        "--steps", type=int, default=20, help="denoising steps of the visualizer (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of sampling and of the visualizer's noise")
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
    session = load(flags.model, flags.visualizer, flags.device, dashes="--")
    torch.manual_seed(flags.seed)
    sampling = {"do_sample": True, "temperature": flags.temperature} if flags.temperature else {}
    reply = session.reply(
        flags.prompt,
        images,
        settings=SamplerSettings(flags.guidance_scale, flags.steps, flags.seed),
        max_new_tokens=flags.max_new_tokens,
        **sampling,
    )
    names = iter(save_images(reply.images, Path(flags.output)))
    for part in reply.parts:
        print(
            printable(part.text)
            if isinstance(part, TextPart)
            else f"[picture: {next(names, 'not drawn without --visualizer')}]"
        )


def check_inputs(flags: argparse.Namespace) -> "list[Image.Image]":
    """Check everything that does not need weights, and open the pictures.

    Args:
        flags: The command line.
    """
    if flags.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens {flags.max_new_tokens} must be at least 1")
    if flags.temperature < 0:
        raise ValueError(f"--temperature {flags.temperature} must be 0 (greedy) or larger")
    missing = [path for path in flags.image if not Path(path).is_file()]
    if missing:
        raise FileNotFoundError(f"--image {missing[0]} does not exist")
    markers = flags.prompt.count(DEFAULT_IMAGE_TOKEN)
    if markers not in (0, len(flags.image)):
        raise ValueError(
            f"--prompt has {markers} {DEFAULT_IMAGE_TOKEN}, but there are {len(flags.image)} --image flags"
        )
    return open_pictures(flags.image)


def save_images(images: "Sequence[Image.Image]", output: Path) -> list[Path]:
    """Write the images to `output` and, where there are several, to names with `-2`, `-3`, … before the suffix."""
    output.parent.mkdir(parents=True, exist_ok=True)
    numbered = (output.with_stem(f"{output.stem}-{number}") for number in range(2, len(images) + 1))
    files = [output, *numbered][: len(images)]
    for image, file in zip(images, files, strict=True):
        image.save(file)
    return files
