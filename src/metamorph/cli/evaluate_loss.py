"""`metamorph evaluate loss --model FOLDER --data_path DATA`: losses of a trained model, by source."""

import argparse
import json

from metamorph.cli.shared import print_table
from metamorph.flags.checks import check_metamorph_model, errors_name_flag
from metamorph.flags.parser import at_least, output_file


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    parser.set_defaults(run=_run)
    parser.add_argument("--model", required=True, help="folder or Hub id of a trained model, or mini")
    parser.add_argument("--data_path", required=True, help="records, as for metamorph train")
    parser.add_argument("--image_folder", help="folder of relative media paths (default: the folder of the records)")
    parser.add_argument(
        "--model_max_length", type=at_least(2), default=4096, help="length to which samples are truncated"
    )
    parser.add_argument("--batch_size", type=at_least(1), default=8, help="samples per batch")
    parser.add_argument("--workers", type=at_least(0), default=0, help="data loader workers")
    parser.add_argument("--cpu", action="store_true", help="compute on the CPU even if there is an accelerator")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    parser.add_argument("--output", type=output_file, help="JSON file of the results")


def _run(flags: argparse.Namespace) -> None:
    from metamorph.mini import shipped_folder

    folder = shipped_folder(flags.model, "model")
    check_metamorph_model(folder, flag="--model")

    import torch
    from accelerate import Accelerator

    from metamorph.data.dataset import load_data
    from metamorph.evaluation.losses import evaluate_losses, total_loss
    from metamorph.models.modeling_metamorph import MetaMorphForConditionalGeneration
    from metamorph.models.processing_metamorph import MetaMorphProcessor

    with errors_name_flag("--model", folder):
        processor = MetaMorphProcessor.from_pretrained(folder)
    data = load_data(flags.data_path, processor, flags.image_folder, flags.model_max_length)
    accelerator = Accelerator(cpu=flags.cpu, mixed_precision="bf16" if flags.bf16 else "no")
    with errors_name_flag("--model", folder):
        model = MetaMorphForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        model = model.to(accelerator.device)
    losses = evaluate_losses(model, data, accelerator, batch_size=flags.batch_size, num_workers=flags.workers)
    losses["all"] = total_loss(losses)
    coefficient = model.config.vision_coef
    if accelerator.is_main_process:
        values = {name: loss.as_metrics("", coefficient) for name, loss in losses.items()}
        optional, rows = ("visual_loss", "visual_cosine", "visual_cosine_baseline", "image_start_accuracy"), []
        for name, found in values.items():
            *visual, starts = (f"{found[key]:.4f}" if key in found else "-" for key in optional)
            text = (f"{found['loss']:.4f}", f"{found['text_loss']:.4f}", f"{found['num_text_tokens']:,}")
            answers = f"{found['num_image_answers']:,}"
            rows.append((name, *text, *visual, f"{found['num_visual_tokens']:,}", starts, answers))
        visual_columns = ("visual", "cosine", "baseline", "tokens", "starts", "answers")
        print_table(("source", "loss", "text", "tokens", *visual_columns), rows)
        if flags.output is not None:
            flags.output.parent.mkdir(parents=True, exist_ok=True)
            flags.output.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
