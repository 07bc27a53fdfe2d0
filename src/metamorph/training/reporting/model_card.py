"""The model card of a result: `README.md` with data, recipe and metrics, as the Hub shows it."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerState

from metamorph.runs.cards import CARD_FILE, render_card, shown
from metamorph.training.arguments import DataArguments, MetaMorphTrainingArguments, ModelArguments


MODEL_FLAGS_LEFT_OUT = ("model_name_or_path", "vision_tower", "pretrain_mm_mlp_adapter", "model_license")
"""Local paths, and flags that have their own section."""
TRAINING_FLAGS = (
    *("learning_rate", "mm_projector_lr", "vision_head_lr", "vision_lr", "lr_scheduler_type", "warmup_steps"),
    *("weight_decay", "max_grad_norm", "optim", "num_train_epochs", "max_steps", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "world_size", "packing", "loss_normalization", "bf16", "fp16"),
    *("gradient_checkpointing", "seed"),
)
METRICS = ("loss", "text_loss", "visual_loss", "visual_cosine", "visual_cosine_baseline")
"""Metrics of training; all that begin with `eval_` are added."""
LIBRARIES = ("torch", "transformers", "accelerate")


@dataclasses.dataclass(frozen=True)
class CardFacts:
    """Flags and data of the run that a card describes."""

    model_args: ModelArguments
    data_args: DataArguments
    training_args: MetaMorphTrainingArguments
    statistics: Mapping[str, Any]
    """`TrainResult.data_statistics`."""


def write_model_card(folder: str | Path, facts: CardFacts, state: TrainerState) -> Path:
    """Write `README.md`: metadata for the Hub, then what the result is, data, recipe, metrics and licences."""
    args = facts.model_args
    kind = "connector" if args.stage == 1 else "adapter" if args.lora_enable else "model"
    parts = {"language model": args.model_name_or_path}
    if not args.continues_metamorph:
        parts["vision tower"] = args.vision_tower
    name = facts.training_args.hub_model_id or Path(facts.training_args.output_dir or ".").resolve().name
    card = render_card(
        "model_card.md.jinja",
        name,
        parts=parts,
        recipe=_recipe(facts),
        libraries=LIBRARIES,
        model_license=args.model_license,
        data_license=facts.data_args.data_license,
        tags=["metamorph", "vpit", *(["lora"] if kind == "adapter" else [])],
        pipeline_tag="image-text-to-text",
        kind=kind,
        folder=name if "/" in name else "FOLDER",
        sources={shown(source): _use(counts) for source, counts in facts.statistics["sources"].items()},
        model_max_length=facts.data_args.model_max_length,
        steps=state.global_step,
        metrics=_metrics(state),
    )
    path = Path(folder) / CARD_FILE
    path.write_text(card, encoding="utf-8")
    return path


def _use(counts: Mapping[str, Any]) -> str:
    bad = counts["bad"]
    skipped = sum(bad.values()) if isinstance(bad, Mapping) else bad
    return f"{counts['records']} records, {counts['truncated']} cut, {skipped} skipped"


def _recipe(facts: CardFacts) -> dict[str, Any]:
    args = facts.model_args
    values = dataclasses.asdict(args) | {"use_vision_ar": args.resolved_use_vision_ar}
    left_out = [*MODEL_FLAGS_LEFT_OUT, *(["double_quant", "quant_type"] if args.bits != 4 else [])]
    left_out += [name for name in values if name.startswith("lora_") and not args.lora_enable]
    values = {name: value for name, value in values.items() if name not in left_out}
    return values | {name: getattr(facts.training_args, name) for name in TRAINING_FLAGS}


def _metrics(state: TrainerState) -> dict[str, float]:
    """The last value of each metric."""
    return {
        name: value
        for line in state.log_history
        for name, value in line.items()
        if isinstance(value, (int, float)) and (name in METRICS or name.startswith("eval_"))
    }
