"""How a run resumes: the checkpoint it finds, and the sample at which it continues.

1. `MetaMorphTrainer.checkpoint_metadata` puts into every checkpoint its `Position` and a description of the data
   (`describe_data`); `RunTrainer` adds the flags of the run.
2. `find_stage_checkpoint` picks the newest complete checkpoint of the output folder, or the one that is asked for. The
   search is in `metamorph.runs.find_checkpoint`, which both trainers use.
3. `plan_resume` checks that the data are those of the checkpoint and computes the `ResumePoint`. A `Position` counts
   rows in the order of the epoch, which does not depend on the number of processes or the batch size, so a run may
   resume with other batches.
4. `resume_flags.check_flags` compares the flags.
5. `MetaMorphTrainer.set_resume_point` leaves out the rows of the epoch that have been trained on, and Trainer starts at
   the step of the `ResumePoint`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from metamorph.data.batching.packing import PACKING_VERSION, BatchPlanner
from metamorph.data.dataset import MixtureDataset
from metamorph.data.records import RecordError
from metamorph.models.adapters import is_adapter_folder
from metamorph.runs.checkpoint_files import CheckpointError, read_manifest
from metamorph.runs.find_checkpoint import ResumePoint, find_checkpoint
from metamorph.training.arguments import MetaMorphTrainingArguments
from metamorph.training.checkpoints.shards import is_deepspeed
from metamorph.training.checkpoints.weights import ARGUMENTS_FILE


logger = logging.getLogger(__name__)

_COMPARED_RECORDS = 256
"""Number of records, spread over the data, whose content is compared."""
_FLAGS = {
    "sources": "--data_path",
    "records": "--data_path",
    "seed": "--data_seed (or --seed)",
    "packing": "--packing",
    "row_length": "--model_max_length",
    "sampling": "--train_sampling_strategy",
    "rows": "--data_path, --model_max_length, --version or the tokenizer",
}
"""Keys of `describe_data`, the most telling first -> the flags that determine them."""


_START_EPOCH_AGAIN = (
    "add --ignore_data_skip True, which keeps weights, optimizer and step and starts an epoch of this run's data, or "
    "start from the beginning with --resume_from_checkpoint False"
)


def find_stage_checkpoint(output_dir: str, request: str | bool | None, stage: int, adapter: bool = False) -> str | None:
    """The checkpoint to resume from: `metamorph.runs.find_checkpoint` with the checks of a stage."""

    def check(folder: str) -> None:
        manifest = read_manifest(folder) or {}
        found = manifest.get("stage")
        found_adapter = is_adapter_folder(folder) or "lora_r" in (manifest.get("flags") or {})
        if found != stage:
            raise ValueError(
                f"{folder} is a checkpoint of stage {found}, but this run is stage {stage}: give each stage its own "
                "--output_dir, or start from the beginning with --resume_from_checkpoint False"
            )
        if found_adapter != adapter:
            raise ValueError(
                f"{folder} is a checkpoint with --lora_enable {found_adapter}, but this run has --lora_enable "
                f"{adapter}: give each its own --output_dir, or start from the beginning with "
                "--resume_from_checkpoint False"
            )

    return find_checkpoint(output_dir, request, check, ARGUMENTS_FILE, saves_on_each_node=True)


def plan_resume(
    checkpoint: str | None, dataset: MixtureDataset, planner: BatchPlanner, args: MetaMorphTrainingArguments
) -> ResumePoint | None:
    """Find where in the data a run resumes, and check that they are the data of the checkpoint.

    If an optimizer step has another number of rows than before, steps are recounted as if the entire run had had the
    new number: the learning rate schedule keeps its place relative to the data, and no row is skipped or repeated.

    Returns None without a checkpoint, and with `ignore_data_skip`, which starts an epoch again. Raises a
    `CheckpointError` if the data differ, or the batches in a way that does not allow resuming.
    """
    if checkpoint is None or args.ignore_data_skip:
        return None
    manifest = read_manifest(checkpoint)
    if manifest is None or manifest["position"] is None:
        raise CheckpointError(
            f"{checkpoint} does not record its position in the data (no checkpoint does after a resume with "
            "--ignore_data_skip True); add --ignore_data_skip True, which starts an epoch again"
        )
    _check_data(checkpoint, manifest["data"], describe_data(dataset, planner))
    old = Position(**manifest["position"])
    new = Position.at(0, planner, args.gradient_accumulation_steps)
    if planner.group_by_length and old.rows_per_micro_batch != new.rows_per_micro_batch:
        raise CheckpointError(
            f"{checkpoint} has micro-batches of {old.rows_per_micro_batch} samples over all processes, this run has "
            f"{new.rows_per_micro_batch}, and the order of --train_sampling_strategy group_by_length depends on them: "
            "choose --per_device_train_batch_size so that its product with the number of processes is the same"
        )
    if is_deepspeed(checkpoint) and old.processes != new.processes:
        raise CheckpointError(
            f"{checkpoint} was written by DeepSpeed on {old.processes} processes and can only be resumed on the same "
            f"number, not on {new.processes}"
        )
    if is_deepspeed(checkpoint) != (args.deepspeed_plugin is not None):
        raise CheckpointError(
            f"{checkpoint} was written {'with' if is_deepspeed(checkpoint) else 'without'} DeepSpeed, whose optimizer "
            "states are its own: resume it with the --sharding that it had"
        )
    if args.fsdp and not manifest.get("in_shards"):
        raise CheckpointError(
            f"{checkpoint} was not written with FSDP2, with which this run trains: resume it with the --sharding that "
            "it had"
        )
    if old.rows_per_step == new.rows_per_step:
        return ResumePoint(manifest["step"], old.epoch, old.rows, rescales_steps=False)
    step = old.epoch * steps_per_epoch(planner, args.gradient_accumulation_steps) + old.rows // new.rows_per_step
    logger.warning(
        "an optimizer step had %d rows (over %d processes) and now has %d (over %d): step %d becomes step %d, and the "
        "epoch continues at row %d of %d. --gradient_accumulation_steps can keep the size of the steps",
        old.rows_per_step,
        old.processes,
        new.rows_per_step,
        new.processes,
        manifest["step"],
        step,
        old.rows,
        planner.num_rows,
    )
    return ResumePoint(step, old.epoch, old.rows, rescales_steps=True)


def describe_data(dataset: MixtureDataset, planner: BatchPlanner) -> dict[str, Any]:
    """What determines the samples and their order: two runs with equal descriptions train on the same samples.

    Paths and modification times do not matter, so data may be moved between two runs. A few hundred records are read.
    """
    records = hashlib.sha256()
    for index in np.unique(np.linspace(0, len(dataset) - 1, _COMPARED_RECORDS).astype(np.int64)).tolist():
        try:
            source, number = dataset.locate(index)
            records.update(json.dumps(source.record(number).fields, default=str).encode())
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
    """A place in the data, between two optimizer steps. Rows are counted over all processes."""

    epoch: int
    """From 0."""
    rows: int
    """Rows of the epoch that have been trained on; a prefix of its order."""
    rows_per_micro_batch: int
    rows_per_step: int
    processes: int
    """Data-parallel processes."""

    @classmethod
    def at(cls, step: int, planner: BatchPlanner, accumulation: int) -> Position:
        """The position after `step` optimizer steps of `accumulation` micro-batches."""
        micro_batch = planner.world_size * planner.rows_per_batch
        epoch, steps = divmod(step, steps_per_epoch(planner, accumulation))
        rows = min(steps * accumulation * micro_batch, planner.num_rows)
        return cls(epoch, rows, micro_batch, micro_batch * accumulation, planner.world_size)


def steps_per_epoch(planner: BatchPlanner, accumulation: int) -> int:
    """Optimizer steps of an epoch; the last may have fewer rows than the others."""
    return math.ceil(planner.steps / accumulation)


def _check_data(checkpoint: str, old: dict[str, Any], new: dict[str, Any]) -> None:
    # Checkpoints of version 1 lack this key.
    if old.get("packing") and new["packing"] and old.get("packing_version", 1) != new["packing_version"]:
        raise CheckpointError(
            f"{checkpoint} was written by a release of MetaMorph that packs other samples into a row (packing version "
            f"{old.get('packing_version', 1)}, here {new['packing_version']}), so its place in the epoch cannot be "
            f"found. Finish the run with that release, or {_START_EPOCH_AGAIN}"
        )
    for name, flag in _FLAGS.items():
        if old.get(name) != new[name]:
            raise CheckpointError(
                f"{checkpoint} was trained on other data: {name} {old.get(name)} there, {new[name]} here. Restore "
                f"{flag}, or {_START_EPOCH_AGAIN}"
            )
