"""The model card of a result: `README.md` with data, recipe and metrics, as the Hub shows it."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerState

from metamorph.runs.cards import CARD_FILE, code, licences, render_card, shown, table, versions
from metamorph.training.arguments import DataArguments, MetaMorphTrainingArguments, ModelArguments


MODEL_FLAGS_LEFT_OUT = ("model_name_or_path", "vision_tower", "pretrain_mm_mlp_adapter", "model_license")
"""Paths of this machine, and what the card says elsewhere."""
TRAINING_FLAGS = (
    "learning_rate",
    "mm_projector_lr",
    "vision_head_lr",
    "vision_lr",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "optim",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "world_size",
    "packing",
    "loss_normalization",
    "bf16",
    "fp16",
    "gradient_checkpointing",
    "seed",
)
METRICS = ("loss", "text_loss", "visual_loss", "visual_cosine", "visual_cosine_baseline")
"""Of training; all that begins with `eval_` is added."""
LIBRARIES = ("torch", "transformers", "accelerate")


@dataclasses.dataclass(frozen=True)
class CardFacts:
    """What a card is made of."""

    model_args: ModelArguments
    """Flags of the model."""
    data_args: DataArguments
    """Flags of the data."""
    training_args: MetaMorphTrainingArguments
    """Flags of training."""
    statistics: Mapping[str, Any]
    """`TrainResult.data_statistics`."""


def write_model_card(folder: str | Path, facts: CardFacts, state: TrainerState) -> Path:
    """Write `README.md`.

    Args:
        folder: Folder of the result.
        facts: What the run was asked to do, and the data it met.
        state: Where the trainer has come to.
    """
    path = Path(folder) / CARD_FILE
    path.write_text(render_model_card(facts, state), encoding="utf-8")
    return path


def render_model_card(facts: CardFacts, state: TrainerState) -> str:
    """The text of the card: metadata for the Hub, then what it is, data, recipe, metrics and licences."""
    args = facts.model_args
    kind = "connector" if args.stage == 1 else "adapter" if args.lora_enable else "model"
    base = {"language model": args.model_name_or_path}
    if not args.continues_metamorph:
        base["vision tower"] = args.vision_tower
    name = facts.training_args.hub_model_id or Path(facts.training_args.output_dir or ".").resolve().name
    sections = [
        _what(kind, base, name),
        _data(facts),
        table("Recipe", "flag", "value", _recipe(facts)),
        table(f"Metrics after {state.global_step} steps", "metric", "last value", _metrics(state)),
        licences(args.model_license, facts.data_args.data_license),
    ]
    return render_card(
        name,
        sections,
        parts=base.values(),
        license_name=args.model_license,
        tags=["metamorph", "vpit", *(["lora"] if kind == "adapter" else [])],
        pipeline_tag="image-text-to-text",
    )


def _what(kind: str, base: Mapping[str, str], name: str) -> str:
    parts = "\n".join(f"- {part}: {code(shown(value))}" for part, value in base.items())
    folder = name if "/" in name else "FOLDER"
    usage = {
        "connector": f"metamorph train --pretrain_mm_mlp_adapter {folder} …",
        "adapter": f"metamorph generate --model {folder} --prompt 'What is in this picture?' --image photo.jpg\n"
        f"metamorph convert --merge-adapter {folder} --output-dir merged",
        "model": f"metamorph generate --model {folder} --prompt 'What is in this picture?' --image photo.jpg",
    }[kind]
    what = {
        "connector": "The connector of a MetaMorph model (stage 1 of VPiT), for stage 2 to start from",
        "adapter": "A LoRA adapter for MetaMorph (stage 2 of VPiT), with its connector, vision head and new token rows",
        "model": "A MetaMorph model (stage 2 of VPiT), which reads and writes text and pictures",
    }[kind]
    return f"{what}. Trained from\n\n{parts}\n\n```bash\n{usage}\n```\n"


def _data(facts: CardFacts) -> str:
    rows = []
    for source, counts in facts.statistics["sources"].items():
        bad = counts["bad"]
        skipped = sum(bad.values()) if isinstance(bad, Mapping) else bad
        rows.append((shown(source), f"{counts['records']} records, {counts['truncated']} cut, {skipped} skipped"))
    text = table("Data", "source", "use", rows)
    length = facts.data_args.model_max_length
    return f"{text}\nRecords longer than {length} tokens were cut. Skipped records could not be used.\n"


def _recipe(facts: CardFacts) -> list[tuple[str, Any]]:
    values = {
        name: value for name, value in dataclasses.asdict(facts.model_args).items() if name not in MODEL_FLAGS_LEFT_OUT
    }
    values["use_vision_ar"] = facts.model_args.resolved_use_vision_ar
    if not facts.model_args.lora_enable:
        values = {name: value for name, value in values.items() if not name.startswith("lora_")}
    if facts.model_args.bits != 4:
        values = {name: value for name, value in values.items() if name not in ("double_quant", "quant_type")}
    values |= {name: getattr(facts.training_args, name) for name in TRAINING_FLAGS}
    return [*values.items(), *versions(*LIBRARIES)]


def _metrics(state: TrainerState) -> list[tuple[str, float]]:
    last: dict[str, float] = {}
    for line in state.log_history:
        last |= {
            name: value
            for name, value in line.items()
            if isinstance(value, (int, float)) and (name in METRICS or name.startswith("eval_"))
        }
    return list(last.items())
