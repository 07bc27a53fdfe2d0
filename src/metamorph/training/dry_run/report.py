"""Formats the report of `metamorph train --dry-run`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from enum import Enum
from typing import Any

from metamorph.training.arguments import MetaMorphTrainingArguments
from metamorph.training.arguments.shared import RunTrainingArguments
from metamorph.training.arguments.training import AUTO_LEARNING_RATE
from metamorph.training.costs.memory import GIB
from metamorph.training.dry_run.preview import DryRun, recomputed
from metamorph.training.optimizer import LANGUAGE_MODEL, VISION_TOWER, learning_rates
from metamorph.training.stages import ModuleSummary


_MEMORY_ROWS = {
    "weights": "weights, float32 where trained",
    "compute_copies": "copies of them to compute with",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "logits": "logits",
    "frozen_tower": "frozen vision tower",
    "runtime": "CUDA and libraries (assumed)",
}
_LOCAL_FLAGS = ("use_cpu", "dataloader_pin_memory", "disable_tqdm", "label_names")
"""Flags that depend on the machine of this process, not on the one that is planned for."""


def format_dry_run(run: DryRun) -> str:
    """All sections of the report."""
    sections = {
        "Configuration (* given by a flag or the recipe, otherwise the default)": _configuration(run),
        f"What stage {run.args.model.stage} trains": _trained(run),
        "Batch and learning rate": _batch(run),
        f"Memory of each GPU with {run.engine}, an estimate": _memory(run),
        "Still missing": _notes(run),
    }
    parts = ["dry run: nothing is trained and no weights are read"]
    parts += ["\n".join([title, *(f"  {line}" for line in lines)]) for title, lines in sections.items() if lines]
    return "\n\n".join(parts)


def _configuration(run: DryRun) -> list[str]:
    lines = []
    for flags in (run.args.model, run.args.data, run.args.training):
        for field, value in _shown(flags):
            mark = "*" if flags.is_given(field.name) else " "
            lines.append(f"{mark} {field.name:<32}{_text(value)}")
    return lines


def _shown(flags: Any) -> Iterator[tuple[Field, Any]]:
    """Our own flags, and those of Transformers that were given or changed."""
    own = RunTrainingArguments.__annotations__ | MetaMorphTrainingArguments.__annotations__
    for field in fields(flags):
        value = getattr(flags, field.name)
        value = value.value if isinstance(value, Enum) else value
        ours = not isinstance(flags, MetaMorphTrainingArguments) or field.name in own
        # Transformers derives some fields from others: only plain values count as changed.
        changed = isinstance(value, (str, int, float)) and value != field.default and field.default is not MISSING
        changed &= value is not False or field.default is not None  # nor does an unset flag that became False
        if field.init and field.name not in _LOCAL_FLAGS and (ours or changed or flags.is_given(field.name)):
            yield field, value


def _trained(run: DryRun) -> list[str]:
    auto = run.args.training.learning_rate == AUTO_LEARNING_RATE
    rates = {} if auto else learning_rates(run.args.training)
    lines = [f"{'module':<16}{'trained':>16}{'frozen':>16}{'learning rate':>16}   dtype"]
    for line in run.summary:
        rate = "-" if not line.trainable else f"{rates[line.module]:.3g}" if rates else AUTO_LEARNING_RATE
        lines.append(f"{line.module:<16}{line.trainable:>16,}{line.frozen:>16,}{rate:>16}   {_dtype(run, line)}")
    trained = sum(line.trainable for line in run.summary)
    total = trained + sum(line.frozen for line in run.summary)
    lines.append(f"{'all':<16}{trained:>16,}{total - trained:>16,}{'':>16}   {100 * trained / total:.2f} % trained")
    return lines


def _dtype(run: DryRun, line: ModuleSummary) -> str:
    """Precision of the weights of a module, and of the computation with them."""
    compute = str(run.args.compute_dtype).removeprefix("torch.")
    if not line.trainable and line.module == VISION_TOWER:
        return compute
    kept = "float32" if compute == "float32" else f"float32, computes in {compute}"
    if line.module == LANGUAGE_MODEL and line.frozen and run.matrix_bytes < 4:
        matrices = "4 bits" if run.matrix_bytes < 1 else compute
        return f"{kept}; frozen matrices in {matrices}"
    return kept


def _batch(run: DryRun) -> list[str]:
    args, data = run.args.training, run.data
    unit = "rows" if args.packing else "samples"
    lines = [
        f"global batch = {args.per_device_train_batch_size} per GPU × {args.gradient_accumulation_steps} accumulation "
        f"steps × {run.num_gpus} GPUs × {run.num_nodes} nodes = {run.global_batch} {unit}"
    ]
    if data is not None:
        lines.append(
            f"data: {data.samples:,} samples of {data.tokens:.0f} tokens and {data.images:.2f} images on average "
            f"({data.measured:,} of them measured)"
        )
    if data is not None and args.packing:
        lines.append(
            f"packing: {data.per_row:.1f} samples per row of {run.args.data.model_max_length} tokens, "
            f"{data.per_row * run.global_batch:.0f} per step"
        )
    lines.append(f"learning rate: {run.learning_rate.removeprefix('learning rate ')}")
    if run.steps_per_epoch is not None:
        epochs = args.num_train_epochs
        steps = args.max_steps if args.max_steps > 0 else round(run.steps_per_epoch * epochs)
        lines.append(
            f"steps: {run.steps_per_epoch:,} per epoch, {steps:,} in total, {args.get_warmup_steps(steps):,} of "
            "them warm-up"
        )
    return lines


def _memory(run: DryRun) -> list[str]:
    estimate = run.memory[run.engine]
    lines = [f"{text:<34}{getattr(estimate, name) / GIB:>8.1f} GiB" for name, text in _MEMORY_ROWS.items()]
    verdict = "fits" if estimate.total <= 0.9 * run.gpu_memory * GIB else "does not fit (with a tenth left free)"
    total = f"{estimate.total / GIB:>8.1f} GiB   {verdict} into {run.gpu_memory:g} GiB (--gpu_memory)"
    lines.append(f"{'total':<34}{total}")
    if estimate.host:
        lines.append(f"{'main memory of each process':<34}{estimate.host / GIB:>8.1f} GiB")
    lines.append(
        f"for {run.batch.rows} × {run.batch.length} tokens and {run.batch.images:.1f} images at a time, --recompute "
        f"{recomputed(run.args.training)}"
    )
    others = [f"{name} {other.total / GIB:.1f}" for name, other in run.memory.items() if name != run.engine]
    if others:
        lines.append(f"with other engines (--sharding): {', '.join(others)} GiB")
    return lines


def _notes(run: DryRun) -> list[str]:
    notes, model_args = [], run.args.model
    has_connector = model_args.stage == 1 or model_args.continues_metamorph or model_args.from_scratch_connector
    if run.args.data.missing_data is not None:
        notes.append(f"steps per epoch and samples per row: {run.args.data.missing_data}")
    if model_args.missing_connector is not None:
        notes.append(f"--pretrain_mm_mlp_adapter {model_args.missing_connector} does not exist yet")
    elif model_args.pretrain_mm_mlp_adapter is None and not has_connector:
        notes.append("--pretrain_mm_mlp_adapter: stage 2 needs the connector of stage 1")
    return notes


def _text(value: Any) -> str:
    return "-" if value is None or value == "" else str(value)
