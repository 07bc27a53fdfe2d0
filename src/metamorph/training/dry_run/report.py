"""Formats the report of `metamorph train --dry-run`; its text is in `templates/dry_run.txt.jinja`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, fields
from enum import Enum
from typing import Any

from metamorph.files.templates import render
from metamorph.training.arguments import MetaMorphTrainingArguments, RunArguments
from metamorph.training.arguments.shared import RunTrainingArguments
from metamorph.training.arguments.training import AUTO_LEARNING_RATE
from metamorph.training.costs.memory import GIB, recomputed
from metamorph.training.dry_run.preview import DryRun
from metamorph.training.optimizer import LANGUAGE_MODEL, VISION_TOWER, learning_rates
from metamorph.training.stages import ModuleSummary


_LOCAL_FLAGS = ("use_cpu", "dataloader_pin_memory", "disable_tqdm", "label_names")
"""Flags that depend on the machine of this process, not on the one that is planned for."""


def format_dry_run(run: DryRun) -> str:
    """The text of the report."""
    others = [f"{name} {other.total / GIB:.1f}" for name, other in run.memory.items() if name != run.engine]
    return render(
        "dry_run.txt.jinja",
        run=run,
        training=run.args.training,
        configuration=list(_configuration(run.args)),
        modules=list(_modules(run)),
        estimate=run.memory[run.engine],
        gib=GIB,
        recomputed=recomputed(run.args.training),
        others=", ".join(others),
        missing=list(_missing(run.args)),
    ).rstrip()


def _configuration(args: RunArguments) -> Iterator[tuple[bool, str, str]]:
    """Our flags, and those of Transformers that were given or changed: whether given, name, value."""
    own = RunTrainingArguments.__annotations__ | MetaMorphTrainingArguments.__annotations__
    for flags in (args.model, args.data, args.training):
        for field in fields(flags):
            value: Any = getattr(flags, field.name)
            value = value.value if isinstance(value, Enum) else value
            ours = not isinstance(flags, MetaMorphTrainingArguments) or field.name in own
            # Transformers derives some fields from others: only plain values count as changed.
            changed = isinstance(value, (str, int, float)) and value != field.default and field.default is not MISSING
            changed &= value is not False or field.default is not None  # nor does an unset flag that became False
            given = flags.is_given(field.name)
            if field.init and field.name not in _LOCAL_FLAGS and (ours or changed or given):
                yield given, field.name, "-" if value is None or value == "" else str(value)


def _modules(run: DryRun) -> Iterator[tuple[str, int, int, str, str]]:
    """The table of trained modules: name, trained and frozen parameters, learning rate, dtype."""
    auto = run.args.training.learning_rate == AUTO_LEARNING_RATE
    rates = {} if auto else learning_rates(run.args.training)
    for line in run.summary:
        rate = "-" if not line.trainable else f"{rates[line.module]:.3g}" if rates else AUTO_LEARNING_RATE
        yield line.module, line.trainable, line.frozen, rate, _dtype(run, line)
    trained, frozen = (sum(getattr(line, name) for line in run.summary) for name in ("trainable", "frozen"))
    yield "all", trained, frozen, "", f"{100 * trained / (trained + frozen):.2f} % trained"


def _dtype(run: DryRun, line: ModuleSummary) -> str:
    """Precision of the weights of a module, and of the computation with them."""
    compute = str(run.args.compute_dtype).removeprefix("torch.")
    if not line.trainable and line.module == VISION_TOWER:
        return compute
    weights = "float32" if compute == "float32" else f"float32, computes in {compute}"
    if line.module == LANGUAGE_MODEL and line.frozen and run.matrix_bytes < 4:
        return f"{weights}; frozen matrices in {'4 bits' if run.matrix_bytes < 1 else compute}"
    return weights


def _missing(args: RunArguments) -> Iterator[str]:
    if args.data.missing_data is not None:
        yield f"steps per epoch and samples per row: {args.data.missing_data}"
    has_connector = args.model.stage == 1 or args.model.continues_metamorph or args.model.from_scratch_connector
    if args.model.missing_connector is not None:
        yield f"--pretrain_mm_mlp_adapter {args.model.missing_connector} does not exist yet"
    elif args.model.pretrain_mm_mlp_adapter is None and not has_connector:
        yield "--pretrain_mm_mlp_adapter: stage 2 needs the connector of stage 1"
