"""`metamorph generate --model DIR [--visualizer DIR] --prompt TEXT [--image FILE]…`: answer in text and images.

With `--input FILE`, a file of prompts.
"""

import argparse
import json
import logging
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metamorph.cli.shared import (
    add_answer_flags,
    check_answer_flags,
    check_image_output,
    loading_dtype,
    open_answering_session,
    open_images,
)
from metamorph.cli.terminal import AnswerPrinter
from metamorph.data.records import VIDEO_MARKER
from metamorph.flags.checks import check_metamorph_model, errors_name_flag
from metamorph.flags.parser import FlagParser, at_least, existing_file, image_file, output_file, output_folder
from metamorph.mini import shipped_folder
from metamorph.models.sequence.constants import DEFAULT_IMAGE_TOKEN
from metamorph.runs.ranks import world_size


if TYPE_CHECKING:
    from PIL import Image


logger = logging.getLogger(__name__)

DEFAULT_OUTPUT = Path("generated.png")
PREVIEW_SIDE = 384
"""Width of the enlarged copy of an image, in pixels."""


def build_parser() -> argparse.ArgumentParser:
    """The flags of the command."""
    parser = FlagParser(prog="metamorph generate", description="Answer a prompt, or a file of prompts.")
    parser.add_argument(
        "--prompt", help=f"text of the prompt, with {DEFAULT_IMAGE_TOKEN} where an --image belongs, or {VIDEO_MARKER}"
    )
    parser.add_argument(
        "--image", type=image_file, action="append", default=[], help="image of the prompt; may be repeated"
    )
    video_help = "video of the prompt, shown to the model as frames; may be repeated"
    parser.add_argument("--video", type=existing_file("a video file"), action="append", default=[], help=video_help)
    parser.add_argument("--draw", action="store_true", help="begin the answer with an image, whatever the prompt")
    output_help = (
        f"file of the image; further ones get -2, -3, … (default: {DEFAULT_OUTPUT}, or the next free name). Without "
        "--visualizer the .safetensors file of its visual tokens; with --input the .jsonl file of the results"
    )
    parser.add_argument("--output", type=output_file, help=output_help)
    parser.add_argument("--output-dir", type=output_folder, help=f"folder for {DEFAULT_OUTPUT} instead")
    parser.add_argument("--overwrite", action="store_true", help="replace existing images or results")
    parser.add_argument("--json", action="store_true", help="print the answer and its files as one JSON object")
    input_help = 'JSON lines such as {"prompt": "draw a cat", "images": [], "id": 1}, answered instead of --prompt'
    parser.add_argument("--input", type=existing_file("a file of JSON lines"), help=input_help)
    batch_help = "prompts of --input that each process answers at once"
    parser.add_argument("--batch-size", type=at_least(1), help=f"{batch_help} (default: 8)")
    add_answer_flags(parser)
    return parser


def main(argv: Sequence[str]) -> int:
    """Print the text of the answer and write its images; 1 if lines of `--input` have errors."""
    flags = build_parser().parse_args(argv)
    if flags.input is not None:
        return answer_file(flags)
    images, videos = check_inputs(flags)
    sampling, settings = check_answer_flags(flags)
    from metamorph.inference.answer_files import AnswerFiles, drawing_metadata, reply_json
    from metamorph.inference.prompt import place_media

    if flags.draw or flags.max_new_tokens is not None:
        check_budget(flags.model, flags.max_new_tokens, draw=flags.draw)
    prompt, media = place_media(flags.prompt, images, videos)
    session = open_answering_session(flags)
    files = AnswerFiles(
        output_of(flags),
        drawing_metadata(flags.model, flags.visualizer, flags.prompt, sampling, settings),
        settings,
        flags.overwrite,
    )
    printer = AnswerPrinter(files, preview=lambda image, file: save_preview(image, file, flags.prompt))
    reply = session.reply(
        prompt,
        media,
        draw=flags.draw,
        settings=settings,
        sampling=sampling,
        max_new_tokens=flags.max_new_tokens,
        on_part=printer.save if flags.json else printer,
    )
    sheet = files.save_sheet()
    if flags.json:
        found = reply_json(reply, [[*map(str, each)] for each in files.files])
        print(json.dumps(found | ({} if sheet is None else {"contact_sheet": str(sheet)})))
    else:
        printer.end(f"[contact sheet: {sheet}]" if sheet is not None else "")
    asked = (flags.visualizer, flags.output, flags.output_dir)
    if not reply.num_images and any(each is not None for each in asked):
        logger.info("the answer has no image to draw; with --draw it begins with one")
    return 0


def output_of(flags: argparse.Namespace) -> Path:
    """The file of the first image."""
    if flags.output is not None:
        return flags.output
    return DEFAULT_OUTPUT if flags.output_dir is None else flags.output_dir / DEFAULT_OUTPUT


def check_inputs(flags: argparse.Namespace) -> "tuple[list[Image.Image], list[list[Image.Image]]]":
    """Check everything that does not need weights, and open the images and the frames of the videos."""
    if flags.prompt is None:
        raise ValueError("give a --prompt, or a file of prompts as --input")
    if not flags.prompt.strip():
        raise ValueError("--prompt is empty: say what the model should answer or draw")
    if flags.batch_size is not None:
        raise ValueError(f"--batch-size {flags.batch_size} needs --input, a file of prompts")
    if world_size() > 1:
        raise ValueError("--prompt is answered by one process: start it without torchrun, or give --input")
    if flags.output is not None:
        check_output(flags)
    from metamorph.inference.prompt import place_media

    try:  # before they are read
        place_media(flags.prompt, flags.image, [[file] for file in flags.video])
    except ValueError as error:
        raise ValueError(f"--prompt, --image and --video do not fit: {error}") from error
    return open_images(flags.image), open_videos(flags.video, flags)


def check_output(flags: argparse.Namespace) -> None:
    """Check `--output`."""
    if flags.output_dir is not None:
        raise ValueError(f"--output {flags.output} and --output-dir {flags.output_dir}: give one of them")
    if flags.visualizer is not None:
        for file in (flags.output, _preview_of(flags.output)):
            check_image_output(file, overwrite=flags.overwrite)
    elif flags.output.suffix != ".safetensors":
        raise ValueError(
            f"--output {flags.output} needs --visualizer, which draws the images; without one, name the .safetensors "
            "file of their visual tokens"
        )
    elif flags.output.exists() and not flags.overwrite:
        raise ValueError(f"--output {flags.output} exists: give another name, or --overwrite")


def open_videos(paths: Sequence[str], flags: argparse.Namespace) -> "list[list[Image.Image]]":
    """The frames of videos; a `ValueError` names one that cannot be read."""
    if not paths:
        return []
    from metamorph.inference.media import load_video
    from metamorph.models.image_files import MediaError

    try:
        return [load_video(path, flags.fps, flags.max_frames) for path in paths]
    except MediaError as error:
        raise ValueError(f"--video {error}") from error


def check_budget(
    model: str,
    max_new_tokens: int | None,
    *,
    draw: bool,
    name_of: Callable[[str], str] = lambda setting: f"--{setting.replace('_', '-')}",
) -> None:
    """Compare `max_new_tokens` with the tokens of an image, before the weights of the model are loaded.

    With `draw`, it is a `ValueError` if the model cannot draw or an image does not fit; `name_of` says what messages
    call the two.
    """
    from metamorph.models.pretrained import load_config

    folder = shipped_folder(model, "model")
    check_metamorph_model(folder, flag="--model")
    with errors_name_flag("--model", folder):
        config: Any = load_config(folder)
    can_draw = config.use_vision_ar and config.image_start_token_id is not None
    if draw and not can_draw:
        raise ValueError(f"{name_of('draw')}: {model} was trained without visual prediction, so it cannot draw")
    needed = config.num_image_tokens + 2
    if max_new_tokens is None or max_new_tokens >= needed or not can_draw:
        return
    message = (
        f"{name_of('max_new_tokens')} {max_new_tokens} has no room for an image, which takes {needed} "
        f"({config.num_image_tokens} visual tokens, <image_start> and <image_end>)"
    )
    if draw:
        raise ValueError(f"{message}; {name_of('draw')} needs it: give {needed} or more, or leave it out")
    logger.warning("%s: the answer will be text only", message)


def save_preview(image: "Image.Image", file: Path, caption: str) -> str:
    """Write an enlarged copy of a small image with a caption to `…-preview`; returns what to print about it."""
    from metamorph.inference.answer_files import SMALL_SIDE
    from metamorph.visualization.grids import image_grid

    if image.width >= SMALL_SIDE:
        return ""
    label = textwrap.shorten(caption, width=60, placeholder=" …")
    preview = _preview_of(file)
    image_grid([[image]], side=PREVIEW_SIDE, labels=[label]).save(preview)
    return f", enlarged: {preview}"


def _preview_of(file: Path) -> Path:
    return file.with_stem(f"{file.stem}-preview")


def answer_file(flags: argparse.Namespace) -> int:
    """Answer the lines of `--input`; returns 1 if some could not be answered, else 0."""
    for flag, is_given in (
        ("--prompt", flags.prompt is not None),
        ("--image", flags.image),
        ("--video", flags.video),
        ("--output-dir", flags.output_dir is not None),
        ("--json", flags.json),
    ):
        if is_given:
            raise ValueError(f"{flag} and --input {flags.input}: give one of them; {_INSTEAD[flag]}")
    if flags.output is None or flags.output.suffix != ".jsonl":
        raise ValueError(f"--input {flags.input} needs --output, a file of results that ends in .jsonl")
    if flags.output.resolve() == Path(flags.input).resolve():
        raise ValueError(f"--output {flags.output} is the file of --input: give another name")
    sampling, settings = check_answer_flags(flags)
    check_metamorph_model(shipped_folder(flags.model, "model"), flag="--model")
    from metamorph.inference.batch_file import Batch, count_errors, joined_processes, open_results, run_batch
    from metamorph.inference.batch_lines import BatchDefaults
    from metamorph.inference.session import check_visualizer_folder
    from metamorph.runs.checkpoint_files import on_first_process
    from metamorph.runs.lock import only_run_in

    if flags.visualizer is not None:
        check_visualizer_folder(shipped_folder(flags.visualizer, "visualizer"))
    if flags.draw or flags.max_new_tokens is not None:
        check_budget(flags.model, flags.max_new_tokens, draw=flags.draw)
    defaults = BatchDefaults(
        flags.draw, sampling, settings, flags.max_new_tokens, flags.fps, flags.max_frames, loading_dtype(flags)
    )
    batch = Batch(Path(flags.input), flags.output, flags.model, flags.visualizer, defaults)
    with joined_processes(), only_run_in(batch.folder, flag="--output"):
        total, done = len(batch.lines()), open_results(batch, overwrite=flags.overwrite)
        if done:
            logger.info("%s has %d of %d results already", flags.output, done, total)
        if done < total:
            run_batch(open_answering_session(flags), batch, done, flags.batch_size or 8)
        errors = on_first_process(lambda: count_errors(flags.output))
    logger.info("%d of %d lines have an error; results: %s", errors, total, flags.output)
    return int(errors > 0)


_INSTEAD = {
    "--prompt": 'the lines hold the prompts, {"prompt": …}',
    "--image": 'the lines name images, {"images": […]}',
    "--video": 'the lines name videos, {"videos": […]}',
    "--output-dir": "images are written next to --output",
    "--json": "results are JSON lines anyway",
}
"""What to do instead of a flag that does not go with `--input`."""
