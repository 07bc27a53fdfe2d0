"""`metamorph generate --model DIR [--visualizer DIR] --prompt TEXT [--image FILE]…`: an answer in text and pictures."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metamorph.cli.shared import choose_device, open_pictures, use_shipped
from metamorph.flags.checks import check_model_reference, check_reachable, names_flag, printable


if TYPE_CHECKING:
    import torch
    from PIL import Image


IMAGE_MARKER = "<image>"


def build_parser() -> argparse.ArgumentParser:
    """The flags of the command."""
    parser = argparse.ArgumentParser(prog="metamorph generate", description="Answer a prompt with text and pictures.")
    parser.add_argument(
        "--model",
        required=True,
        help="folder or Hub id of a trained MetaMorph model; mini is the one that ships with MetaMorph",
    )
    parser.add_argument("--visualizer", help="folder of the visualizer, or mini; without it pictures are only counted")
    parser.add_argument("--prompt", required=True, help=f"the question; {IMAGE_MARKER} says where an --image belongs")
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
    pictures = check_inputs(flags)
    if flags.visualizer is not None:
        check_visualizer_folder(flags.visualizer)
    import torch
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # of loading weights: the output is the answer
    device = choose_device(flags.device)
    torch.manual_seed(flags.seed)
    parts = answer(flags, pictures, device)
    drawn = [part.visual_tokens for part in parts if hasattr(part, "visual_tokens")]
    files = draw(flags, torch.stack(drawn), device) if drawn and flags.visualizer else []
    names = iter(files)
    for part in parts:
        print(
            printable(part.text)
            if hasattr(part, "text")
            else f"[picture: {next(names, 'not drawn without --visualizer')}]"
        )


def check_inputs(flags: argparse.Namespace) -> "list[Image.Image]":
    """Check everything that does not need weights, and open the pictures.

    Args:
        flags: The command line. `prompt` gets the missing image markers in front.
    """
    if flags.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens {flags.max_new_tokens} must be at least 1")
    if flags.temperature < 0:
        raise ValueError(f"--temperature {flags.temperature} must be 0 (greedy) or larger")
    check_model_reference(flags.model, flag="--model")
    if flags.visualizer is not None:
        check_model_reference(flags.visualizer, flag="--visualizer", file="model_index.json")
        check_reachable(flags.visualizer, flag="--visualizer", file="model_index.json")
    check_reachable(flags.model, flag="--model")
    missing = [path for path in flags.image if not Path(path).is_file()]
    if missing:
        raise FileNotFoundError(f"--image {missing[0]} does not exist")
    markers = flags.prompt.count(IMAGE_MARKER)
    if markers == 0 and flags.image:
        flags.prompt = f"{IMAGE_MARKER}\n" * len(flags.image) + flags.prompt
    elif markers != len(flags.image):
        raise ValueError(f"--prompt has {markers} {IMAGE_MARKER}, but there are {len(flags.image)} --image flags")
    return open_pictures(flags.image)


def check_visualizer_folder(name: str) -> None:
    """Check the visualizer before an answer is computed that it could not draw.

    Args:
        name: Folder or Hub id.

    Raises:
        ValueError: if diffusers is not installed, or the folder holds anything but a visualizer.
    """
    try:
        from metamorph.visualization.folders import check_visualizer, visualizer_folder
    except ModuleNotFoundError as error:
        raise ValueError(f"--visualizer needs {error.name}: pip install 'metamorph[visualization]'") from error
    with names_flag("--visualizer", name):
        check_visualizer(visualizer_folder(name))


def answer(flags: argparse.Namespace, pictures: "list[Image.Image]", device: "torch.device") -> list[Any]:
    """Generate, and return the answer's text and image parts in order.

    Args:
        flags: The command line.
        pictures: One for each image marker of the prompt.
        device: Where to compute.
    """
    from metamorph.models.modeling_metamorph import MetaMorphForConditionalGeneration
    from metamorph.models.processing_metamorph import MetaMorphProcessor

    with names_flag("--model", flags.model):
        processor = MetaMorphProcessor.from_pretrained(flags.model)
        model = MetaMorphForConditionalGeneration.from_pretrained(flags.model).to(device).eval()
    encoded = processor.encode_conversation(
        [{"role": "user", "content": flags.prompt}], pictures, add_generation_prompt=True
    )
    input_ids = encoded.input_ids[None].to(device)
    sampling = {"do_sample": True, "temperature": flags.temperature} if flags.temperature else {"do_sample": False}
    output = model.generate(
        input_ids,
        attention_mask=input_ids.new_ones(input_ids.shape),
        pixel_values=None if encoded.pixel_values is None else encoded.pixel_values.to(device),
        max_new_tokens=flags.max_new_tokens,
        eos_token_id=processor.end_of_turn_token_ids,
        pad_token_id=processor.pad_token_id,
        **sampling,
    )
    return processor.decode_interleaved(output.sequences, output.visual_tokens, input_ids.shape[1])[0]


def draw(flags: argparse.Namespace, visual_tokens: "torch.Tensor", device: "torch.device") -> list[Path]:
    """Turn visual tokens into picture files.

    Args:
        flags: The command line.
        visual_tokens: [images, tokens, features]
        device: Where to compute.
    """
    import torch
    from diffusers.utils import logging as diffusers_logging

    from metamorph.visualization.pipeline import VisualizationPipeline

    diffusers_logging.disable_progress_bar()
    with names_flag("--visualizer", flags.visualizer):
        pipeline = VisualizationPipeline.from_pretrained(flags.visualizer).to(device)
    images = pipeline(
        visual_tokens,
        guidance_scale=flags.guidance_scale,
        num_inference_steps=flags.steps,
        generator=[torch.Generator("cpu").manual_seed(flags.seed + index) for index in range(len(visual_tokens))],
    ).images
    first = Path(flags.output)
    first.parent.mkdir(parents=True, exist_ok=True)
    files = [first, *(first.with_stem(f"{first.stem}-{number}") for number in range(2, len(images) + 1))]
    for image, file in zip(images, files, strict=True):
        image.save(file)
    return files
