"""`metamorph convert`: merge a LoRA adapter into its base, or import a checkpoint of the original system."""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metamorph.cli.shared import check_tower_reference
from metamorph.flags.checks import check_reachable, errors_name_flag
from metamorph.flags.parser import FlagParser, output_folder


logger = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16", "float16")


def build_parser() -> argparse.ArgumentParser:
    """The flags of the command."""
    parser = FlagParser(
        prog="metamorph convert",
        description="Merge a LoRA adapter into its base, or import a model or connector of the original system.",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--merge-adapter", metavar="FOLDER", help="adapter trained with --lora_enable True")
    what.add_argument("--from", dest="layout", choices=["original"], help="format of --model")
    parser.add_argument("--model", help="with --from: folder of a checkpoint, or an mm_projector.bin (also of LLaVA)")
    output_help = "output folder, which must be empty or not exist"
    parser.add_argument("--output-dir", "--output", type=output_folder, required=True, help=output_help)
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="dtype of the weights")
    parser.add_argument("--tokenizer", help="with --from: folder or Hub id of the tokenizer (default: --model)")
    parser.add_argument("--vision-tower", help="with --from: folder or Hub id of the tower (default: as --model says)")
    return parser


def main(argv: Sequence[str]) -> None:
    """Convert, and print where the result is."""
    flags = build_parser().parse_args(argv)
    check_flags(flags)
    if flags.layout is not None and is_connector(Path(flags.model)):
        from metamorph.models.connector import find_connector, rewrite_connector

        rewrite_connector(find_connector(Path(flags.model)), flags.output_dir)
    else:
        convert_model(flags)
    print(f"written to {flags.output_dir}")


def check_flags(flags: argparse.Namespace) -> None:
    """Check everything that does not need weights."""
    output = flags.output_dir
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"--output-dir {output} is not an empty folder: name a new one")
    for flag, value in (("--model", flags.model), ("--merge-adapter", flags.merge_adapter)):
        if value is not None and not Path(value).exists():
            raise FileNotFoundError(f"{flag} {value} does not exist: give a local folder")
    given = [name for name in ("model", "tokenizer", "vision_tower") if getattr(flags, name) is not None]
    if flags.merge_adapter is not None and given:
        raise ValueError(f"--{given[0].replace('_', '-')} belongs to --from, not to --merge-adapter: drop it")
    if flags.layout is not None and flags.model is None:
        raise ValueError("--from original needs --model: the folder of the checkpoint, or an mm_projector.bin")
    from metamorph.mini import shipped_folder

    if flags.tokenizer is not None:
        flags.tokenizer = shipped_folder(flags.tokenizer, "model")
        if not Path(flags.tokenizer).is_dir():
            check_reachable(flags.tokenizer, "--tokenizer", "tokenizer_config.json")
    if flags.vision_tower is not None:
        flags.vision_tower = shipped_folder(flags.vision_tower, "tower")
        check_tower_reference(flags.vision_tower, "--vision-tower")


def convert_model(flags: argparse.Namespace) -> None:
    """Load a model, merged or of the original system, and write it in `--dtype` with its processor."""
    import torch

    from metamorph.files.permissions import apply_umask
    from metamorph.models.original import load_original

    dtype = getattr(torch, flags.dtype)
    if flags.merge_adapter is not None:
        model, processor = load_merged(flags.merge_adapter)
    else:
        with errors_name_flag("--model", flags.model):
            model, processor = load_original(
                flags.model, tokenizer=flags.tokenizer, vision_tower=flags.vision_tower, dtype=dtype
            )
    model.to(dtype).save_pretrained(flags.output_dir)
    apply_umask(*flags.output_dir.glob("*.safetensors"))
    processor.save_pretrained(flags.output_dir)
    logger.info("%s parameters in %s", f"{model.num_parameters():,}", flags.dtype)


def load_merged(folder: str) -> tuple[Any, Any]:
    """The model and processor in `folder`, with the adapter merged into its base."""
    import torch

    from metamorph.models.adapters import ADAPTER_FILE, is_adapter_folder
    from metamorph.models.modeling_metamorph import MetaMorphForConditionalGeneration
    from metamorph.models.processing_metamorph import MetaMorphProcessor
    from metamorph.runs.checkpoint_files import check_is_plain

    check_is_plain(folder)
    if not is_adapter_folder(folder):
        raise ValueError(
            f"--merge-adapter {folder} has no {ADAPTER_FILE}: give the folder of a run with --lora_enable True"
        )
    # Merge in float32, so that weights are rounded only once.
    with errors_name_flag("--merge-adapter", folder):
        model = MetaMorphForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, dequantize=True)
    return model, MetaMorphProcessor.from_pretrained(folder)


def is_connector(path: Path) -> bool:
    """Whether `path` is a connector file, or a folder with one and no model."""
    from metamorph.models.connector import CONNECTOR_FILES, is_full_model

    return path.is_file() or (not is_full_model(path) and any((path / name).is_file() for name in CONNECTOR_FILES))
