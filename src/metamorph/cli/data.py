"""`metamorph data check | show | cache-features`: look at training data before it is trained on."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from metamorph.flags.checks import check_model_reference, check_reachable, errors_name_flag, printable, refuse_tower
from metamorph.flags.parser import FlagParser, at_least, output_folder


if TYPE_CHECKING:
    from transformers import BaseImageProcessor

    from metamorph.data.checks.check import Diagnosis
    from metamorph.data.dataset import MixtureDataset
    from metamorph.models.processing_metamorph import MetaMorphProcessor

MINIATURE_NOTE = (
    "Without --model_name_or_path, tokens are counted by the quickstart's small tokenizer: texts come out too long, so "
    "the check did not judge whether records are too long."
)
SAMPLES = 12
PROCESSOR_DEFAULTS = {
    "version": "llama3",
    "num_image_tokens": 64,
    "mm_use_im_start_end": True,
    "mm_use_im_patch_token": False,
    "image_aspect_ratio": "square",
}
"""Training's defaults; a finished model has its own values."""
OWN_FLAGS = ("command", "run", "path", "config", "output_dir", "workers", "limit", "index")
"""Flags that a training recipe does not set."""
CACHE_FEATURES = "cache-features"
CACHE_USAGE = (
    "cache-features [PATH] --feature_cache DIR [--config RECIPE] [--feature_dtype bfloat16|float32]\n"
    "       and the model and data flags of `metamorph train`"
)


def build_parser() -> argparse.ArgumentParser:
    """The flags of the three commands."""
    parser = FlagParser(
        prog="metamorph data",
        description="Look at training data before it is trained on.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    check_help = "dry-run all records and report what is wrong with them"
    check = commands.add_parser("check", help=check_help, description=f"{check_help}.".capitalize())
    add_data_flags(check, "data-check", "report")
    check.add_argument(
        "--workers", type=at_least(0), default=min(os.cpu_count() or 1, 8), help="processes (default: %(default)s)"
    )
    check.add_argument("--limit", type=at_least(1), help="check at most this many records, evenly spread")
    check.set_defaults(run=run_check)
    show_help = "print one training sample and write its images"
    show = commands.add_parser("show", help=show_help, description=f"{show_help}.".capitalize())
    add_data_flags(show, "data-show", "images")
    show.add_argument("--index", type=at_least(0), default=0, help="record, counted from 0 (default: %(default)s)")
    show.set_defaults(run=run_show)
    usage = f"metamorph data {CACHE_USAGE}"
    commands.add_parser(CACHE_FEATURES, help="run the frozen tower once over all images", usage=usage)
    parser.epilog = "\n".join(command.format_usage() for command in commands.choices.values())
    return parser


def add_data_flags(parser: argparse.ArgumentParser, output_dir: str, output: str) -> None:
    """Add the flags of the data, of the processor (with the defaults of training), and of the output folder."""
    parser.add_argument("path", nargs="?", metavar="PATH", help="the data, as for --data_path of training")
    parser.add_argument(
        "--config", metavar="RECIPE", help="training recipe: its values are the defaults of the flags below"
    )
    parser.add_argument("--image_folder", help="folder of relative image paths (default: the file's own)")
    parser.add_argument(
        "--output_dir",
        type=output_folder,
        default=Path(output_dir),
        help=f"folder of the {output} (default: %(default)s)",
    )
    parser.add_argument(
        "--model_name_or_path",
        help="the language model, or a finished MetaMorph model (mini is the one that ships with MetaMorph), whose "
        "tokenizer counts tokens (default: a small stand-in)",
    )
    parser.add_argument(
        "--vision_tower",
        help="the vision tower, whose image processor prepares the images (default: that of a finished model, else 384 "
        "pixels a side, as SigLIP-SO400M has)",
    )
    for name, kind, default, text in (
        ("model_max_length", at_least(2), 4096, "longest sequence; not checked without a model"),
        ("version", str, None, "conversation template"),
        ("num_image_tokens", at_least(1), None, "visual tokens per image"),
        ("mm_use_im_start_end", boolean, None, "wrap images in <image_start> and <image_end>"),
        ("mm_use_im_patch_token", boolean, None, "use the placeholder <im_patch>"),
        ("image_aspect_ratio", str, None, "square or pad"),
        ("seed", at_least(0), 42, "seed of the random choices of tasks"),
    ):
        shown = f"that of a finished model, else {PROCESSOR_DEFAULTS[name]}" if default is None else default
        parser.add_argument(f"--{name}", type=kind, default=default, help=f"{text} (default: {shown})")


def boolean(text: str) -> bool:
    """Parse `True` or `False`, in any case."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() == "true"


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line. A recipe gives the defaults of the data and processor flags."""
    parser = build_parser()
    flags = parser.parse_args(argv)
    if flags.config is not None:
        from metamorph.flags.recipes import read_recipe

        recipe = read_recipe(flags.config)
        recipe["seed"] = recipe.get("data_seed", recipe.get("seed"))
        names = {"data_path": "path", **{name: name for name in vars(flags) if name not in OWN_FLAGS}}
        words = [f"--{names[key]}={value}" for key, value in recipe.items() if key in names and value is not None]
        path = [] if flags.path else [word.removeprefix("--path=") for word in words if word.startswith("--path=")]
        words = [word for word in words if not word.startswith("--path=")]
        flags = parser.parse_args([argv[0], *path, *words, *argv[1:]])  # later flags take precedence
    if flags.path is None:
        raise ValueError("PATH is required: a file of records or a mixture, or a --config that names one as data_path")
    return flags


def main(argv: Sequence[str]) -> int:
    """Run one of the commands; the exit status is 1 if `check` found problems."""
    if list(argv[:1]) == [CACHE_FEATURES]:  # takes the flags of training
        from metamorph.cli import cache_features

        cache_features.main(argv[1:])
        return 0
    flags = parse(argv)
    status: int = flags.run(flags)
    return status


def run_check(flags: argparse.Namespace) -> int:
    """Check all records, print a summary and write the report; the exit status is 1 if there are problems."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the workers are parallel already
    data = open_data(flags)
    from metamorph.data.checks.check import check_dataset
    from metamorph.data.checks.report import pick_samples, write_reports

    diagnosis = check_dataset(data, num_workers=flags.workers, limit=flags.limit)
    diagnosis.settings = {
        "data": str(flags.path),
        "tokenizer": flags.model_name_or_path or "stand-in",
        "version": data.processor.version,
        "num_image_tokens": data.processor.num_image_tokens,
        "image_aspect_ratio": data.processor.image_aspect_ratio,
    }
    if flags.model_name_or_path is None:
        diagnosis.note = MINIATURE_NOTE
    samples = pick_samples(data, diagnosis, SAMPLES)
    _, page = write_reports(flags.output_dir, diagnosis, samples, data.processor)
    print_summary(diagnosis)
    print(f"report: {page.resolve()}")
    return 1 if diagnosis.problems else 0


def run_show(flags: argparse.Namespace) -> int:
    """Print one example token by token, and write its images."""
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    data = open_data(flags)
    if flags.index >= len(data):
        raise ValueError(f"--index {flags.index} does not exist: {flags.path} has the records 0 to {len(data) - 1}")
    from metamorph.data.checks.samples import images_of, split_example, token_rows

    example = data[flags.index]
    source, number = data.locate(flags.index)
    record = source.record(number)
    print(f"{printable(record.where)} (id {record.id!r}), {len(example['input_ids'])} tokens")
    numbers = (Column(name, justify="right") for name in ("position", "id"))
    table = Table(*numbers, "token", "loss", box=None, pad_edge=False)
    styles = {"text": "green", "visual target": "magenta", "": ""}
    for *columns, loss in token_rows(split_example(example, data.processor), data.processor):
        table.add_row(*(Text(column) for column in columns), Text(loss), style=styles[loss])
    Console().print(table)
    for number, image in enumerate(images_of(example, data.processor.image_processor)):
        flags.output_dir.mkdir(parents=True, exist_ok=True)
        path = flags.output_dir / f"{flags.index}-image-{number}.png"
        image.save(path)
        print(f"image {number}: {path}")
    return 0


def open_data(flags: argparse.Namespace) -> "MixtureDataset":
    """Open the data with the processor that training would use."""
    if flags.image_folder is not None and not Path(flags.image_folder).is_dir():
        raise FileNotFoundError(f"--image_folder {flags.image_folder} does not exist or is not a folder")
    from metamorph.data.dataset import load_data

    # Lengths in tokens of the stand-in do not make a record too long.
    limit = flags.model_max_length if flags.model_name_or_path is not None else None
    processor = load_processor(flags)
    return load_data(flags.path, processor, flags.image_folder, limit, seed=flags.seed, check=False, weighted=False)


def load_processor(flags: argparse.Namespace) -> "MetaMorphProcessor":
    """The processor of a finished model, or a new one with a language model's tokenizer.

    Without `--vision_tower` or a finished model, images get the size of the default tower (384 pixels). That changes no
    length, because every image becomes `num_image_tokens` tokens.
    """
    name = flags.model_name_or_path
    given = {field: getattr(flags, field) for field in PROCESSOR_DEFAULTS if getattr(flags, field) is not None}
    from metamorph.mini import asset_path, shipped_folder

    tower = flags.vision_tower
    if tower is not None:
        tower = shipped_folder(tower, "tower")
        check_model_reference(tower, flag="--vision_tower")
    if name is not None:
        name = shipped_folder(name, "model")
        check_reachable(name, flag="--model_name_or_path")
    from metamorph.models.configuration_metamorph import MetaMorphConfig
    from metamorph.models.pretrained import load_config, load_tokenizer
    from metamorph.models.processing_metamorph import MetaMorphProcessor
    from metamorph.models.vision_tower import check_same_tower

    if name is None:
        name = str(asset_path("mini-llama"))
    with errors_name_flag("--model_name_or_path", name):
        config = load_config(name)
        refuse_tower(config.to_dict(), name, "--model_name_or_path")
        if config.model_type == MetaMorphConfig.model_type:
            processor = MetaMorphProcessor.from_pretrained(name)
            processor.check_fits(config)
        else:
            tokenizer = load_tokenizer(name)
    if config.model_type != MetaMorphConfig.model_type:
        return MetaMorphProcessor(_image_processor(tower), tokenizer, **{**PROCESSOR_DEFAULTS, **given})
    if tower is not None:
        check_same_tower(config.vision_config, tower, name)
    # As in training, only the aspect ratio may still be changed.
    processor.image_aspect_ratio = given.pop("image_aspect_ratio", processor.image_aspect_ratio)
    for field, asked in given.items():
        found = getattr(processor, field)
        if asked != found:
            raise ValueError(
                f"--{field} {asked} contradicts the model {name}, which was trained with {found}: leave the flag out"
            )
    return processor


def _image_processor(vision_tower: str | None) -> "BaseImageProcessor":
    """The image processor of a tower; that of the default tower is known without a download."""
    from metamorph.models.image_processing import (
        SiglipImageProcessorPil,
        load_image_processor,
        square_image_processor,
    )
    from metamorph.models.vision_tower import VISION_TOWER_ALIASES, load_vision_config

    if vision_tower is None or vision_tower in VISION_TOWER_ALIASES:
        return SiglipImageProcessorPil(size={"height": 384, "width": 384}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    check_reachable(vision_tower, flag="--vision_tower")
    with errors_name_flag("--vision_tower", vision_tower):
        config = load_vision_config(vision_tower)
        processor = load_image_processor(vision_tower)
        # A NaFlex tower of SigLIP 2 has no size: its processor has one.
        return square_image_processor(processor, None if hasattr(processor, "max_num_patches") else config.image_size)


def print_summary(diagnosis: "Diagnosis") -> None:
    """Print how many records are in order, and the kinds of problems with an example of each."""
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    print(f"{diagnosis.num_ok} of {len(diagnosis.rows)} records are in order")
    if diagnosis.note:
        print(diagnosis.note)
    if not diagnosis.problems:
        return
    first = {problem.kind: problem for problem in reversed(diagnosis.problems)}
    table = Table("problem", Column("n", justify="right"), "for example", box=None, pad_edge=False)
    for kind, count in diagnosis.by_kind().items():
        problem = first[kind]
        table.add_row(kind, str(count), Text(f"{problem.source}:{problem.line}: {problem.detail}"))
    Console().print(table)
