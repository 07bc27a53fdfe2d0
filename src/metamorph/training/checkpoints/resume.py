"""How a run resumes: which checkpoint it finds, and the sample at which it continues.

1. `find_checkpoint`: the newest complete checkpoint of the output folder, or the one asked for.
2. `plan_resume`: the data are those of the checkpoint, and `Position` counts rows of the epoch's order, which is the
   same for any number of processes and any batch size; so a run may resume with other batches.
3. `resume_flags.check_flags`: flags that may not differ from the checkpoint's.
4. `MetaMorphTrainer.go_on_from` sets the step, `PlannedBatches.leave_out` the rows that have been trained on.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from metamorph.data.batching.packing import PACKING_VERSION, BatchPlanner
from metamorph.data.dataset import MixtureDataset
from metamorph.data.records import RecordError
from metamorph.models.adapters import is_adapter_folder
from metamorph.models.connector import is_full_model
from metamorph.runs.checkpoint_files import CheckpointError, read_manifest
from metamorph.runs.find_checkpoint import ResumePoint
from metamorph.runs.find_checkpoint import find_checkpoint as find_in_folder
from metamorph.training.arguments import MetaMorphTrainingArguments
from metamorph.training.checkpoints.weights import ARGUMENTS_FILE


logger = logging.getLogger(__name__)

_LOOKED_AT = 256
"""Records, spread over the data, whose text is compared."""
_FLAGS = {
    "sources": "--data_path",
    "records": "--data_path",
    "seed": "--data_seed (or --seed)",
    "packing": "--packing",
    "row_length": "--model_max_length",
    "sampling": "--train_sampling_strategy",
    "rows": "--data_path, --model_max_length, --version or the tokenizer",
}
"""What `describe_data` holds, most telling first, and the flags that decide it."""


def find_checkpoint(output_dir: str, request: str | bool | None, stage: int, adapter: bool = False) -> str | None:
    """The checkpoint to resume from, see [`metamorph.runs.find_checkpoint.find_checkpoint`].

    Raises:
        ValueError: also if the checkpoint is of the other stage, or with an adapter where this run has none.
    """
    check = partial(_check_kind, stage=stage, adapter=adapter)
    return find_in_folder(output_dir, request, check, ARGUMENTS_FILE, saves_on_each_node=True)


def plan_resume(
    checkpoint: str | None, dataset: MixtureDataset, planner: BatchPlanner, args: MetaMorphTrainingArguments
) -> ResumePoint | None:
    """Find where in the data a run goes on, and that they are the data that the checkpoint was trained on.

    The rows of an epoch have one order for any number of processes and any batch size. Where an optimizer step has
    another number of rows than before, steps are counted anew, as if the whole run had had the new ones: the schedule
    of the learning rate stays where it is relative to the data, and no row is left out or met twice.

    Args:
        checkpoint: Result of `find_checkpoint`.
        dataset: The data of this run.
        planner: Plans its batches.
        args: How the run learns.

    Returns:
        The place; None without a checkpoint, and with `ignore_data_skip`, which begins its epoch again.

    Raises:
        CheckpointError: If the data differ, or the batches in a way that cannot be made up for.
    """
    if checkpoint is None or args.ignore_data_skip:
        return None
    manifest = read_manifest(checkpoint)
    if manifest is None or manifest["position"] is None:
        raise CheckpointError(
            f"{checkpoint} does not tell its position in the data (none does behind a resume with --ignore_data_skip "
            "True); add --ignore_data_skip True, which begins an epoch again"
        )
    _check_data(checkpoint, manifest["data"], describe_data(dataset, planner))
    old = Position(**manifest["position"])
    new = Position.at(0, planner, args.gradient_accumulation_steps)
    if planner.group_by_length and old.rows_per_micro_batch != new.rows_per_micro_batch:
        raise CheckpointError(
            f"{checkpoint} comes from micro-batches of {old.rows_per_micro_batch} samples over all processes, this run "
            f"has {new.rows_per_micro_batch}, and --train_sampling_strategy group_by_length orders by them: choose "
            "--per_device_train_batch_size so that the product with the number of processes is the same"
        )
    if (Path(checkpoint) / "latest").is_file() and old.processes != new.processes:  # DeepSpeed's file
        raise CheckpointError(
            f"{checkpoint} was written by DeepSpeed on {old.processes} processes and can only be resumed on as many, "
            f"not on {new.processes}"
        )
    if old.rows_per_step == new.rows_per_step:
        return ResumePoint(manifest["step"], old.epoch, old.rows, counts_anew=False)
    step = old.epoch * steps_per_epoch(planner, args.gradient_accumulation_steps) + old.rows // new.rows_per_step
    logger.warning(
        "an optimizer step had %d rows (over %d processes) and has %d now (over %d): step %d of before counts as step "
        "%d, and the epoch goes on at row %d of %d. --gradient_accumulation_steps can keep the steps as they were",
        old.rows_per_step,
        old.processes,
        new.rows_per_step,
        new.processes,
        manifest["step"],
        step,
        old.rows,
        planner.num_rows,
    )
    return ResumePoint(step, old.epoch, old.rows, counts_anew=True)


def describe_data(dataset: MixtureDataset, planner: BatchPlanner) -> dict[str, Any]:
    """What decides the order of the samples, in short: two runs with the same description train on the same samples.

    Paths and times of files do not count, so that data may be copied to another place between two runs; of the records
    a few hundred are looked at.

    Args:
        dataset: The data.
        planner: Plans its batches.
    """
    records = hashlib.sha256()
    for index in np.unique(np.linspace(0, len(dataset) - 1, _LOOKED_AT).astype(np.int64)).tolist():
        try:
            records.update(json.dumps(dataset.record(index).fields, default=str).encode())
        except RecordError as error:
            records.update(error.kind.encode())
    planned = planner.rows(0)
    rows = hashlib.sha256(np.ascontiguousarray(planned.samples, dtype=np.int64).tobytes())
    rows.update(np.ascontiguousarray(planned.starts, dtype=np.int64).tobytes())
    if planner.packing:  # their order depends on what is supervised in them
        rows.update(np.ascontiguousarray(planner.row_order(0), dtype=np.int64).tobytes())
    sampling = "group_by_length" if planner.group_by_length else "random" if planner.shuffle else "sequential"
    return {
        "sources": dataset.sources,
        "records": records.hexdigest()[:16],
        "seed": planner.seed,
        "packing": planner.packing,
        "packing_version": PACKING_VERSION if planner.packing else None,
        "row_length": planner.max_length if planner.packing else None,
        "sampling": sampling,
        "rows": rows.hexdigest()[:16],
    }


@dataclass(frozen=True)
class Position:
    """A place in the data, between two optimizer steps."""

    epoch: int
    """Number of the epoch, from 0."""
    rows: int
    """Rows of the epoch that have been trained on; a prefix of its order."""
    rows_per_micro_batch: int
    """Rows of a micro-batch, over all processes."""
    rows_per_step: int
    """Rows of an optimizer step, over all processes and micro-batches."""
    processes: int
    """Data-parallel processes."""

    @classmethod
    def at(cls, step: int, planner: BatchPlanner, accumulation: int) -> Position:
        """The position after `step` optimizer steps.

        Args:
            step: Optimizer steps.
            planner: Plans the batches.
            accumulation: Micro-batches of an optimizer step.
        """
        micro_batch = planner.world_size * planner.rows_per_batch
        epoch, steps = divmod(step, steps_per_epoch(planner, accumulation))
        rows = min(steps * accumulation * micro_batch, planner.num_rows)
        return cls(epoch, rows, micro_batch, micro_batch * accumulation, planner.world_size)


def steps_per_epoch(planner: BatchPlanner, accumulation: int) -> int:
    """Optimizer steps of an epoch; the last may hold fewer rows than the others."""
    return math.ceil(planner.steps / accumulation)


def _check_data(checkpoint: str, old: dict[str, Any], new: dict[str, Any]) -> None:
    # Before this key there was version 1.
    if old.get("packing") and new["packing"] and old.get("packing_version", 1) != new["packing_version"]:
        raise CheckpointError(
            f"{checkpoint} was written by a release of MetaMorph that packs other samples into a row (packing version "
            f"{old.get('packing_version', 1)}, here {new['packing_version']}), so that its place in the epoch cannot "
            "be found. Finish the run with that release, or add --ignore_data_skip True, which keeps weights, "
            "optimizer and step and goes through the data from the beginning of an epoch, or start anew with "
            "--resume_from_checkpoint False"
        )
    for name, flag in _FLAGS.items():
        if old.get(name) != new[name]:
            raise CheckpointError(
                f"{checkpoint} was trained on other data: {name} {old.get(name)} there, {new[name]} here. Restore "
                f"{flag}, or add --ignore_data_skip True, which keeps weights, optimizer and step and goes through the "
                "data of this run from the beginning of an epoch, or start anew with --resume_from_checkpoint False"
            )


def _check_kind(folder: str, stage: int, adapter: bool) -> None:
    found_adapter = is_adapter_folder(folder)
    found = 2 if found_adapter or is_full_model(folder) else 1
    if found != stage:
        raise ValueError(
            f"{folder} is a checkpoint of stage {found}, but this run is stage {stage}: give each stage its own "
            "--output_dir, or start anew with --resume_from_checkpoint False"
        )
    if found_adapter != adapter:
        raise ValueError(
            f"{folder} is a checkpoint with --lora_enable {found_adapter}, but this run has --lora_enable {adapter}: "
            "give each its own --output_dir, or start anew with --resume_from_checkpoint False"
        )
