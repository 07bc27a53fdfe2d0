"""Computes what a run would train, on what and with how much memory, from configurations: no weights, no GPUs."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from metamorph.data.batching.lengths import Lengths
from metamorph.data.batching.packing import BatchPlanner
from metamorph.data.dataset import MixtureDataset
from metamorph.data.records import RecordError
from metamorph.training.arguments import MetaMorphTrainingArguments, RunArguments
from metamorph.training.arguments.sharding import check_deepspeed, shard_group
from metamorph.training.arguments.training import AUTO_LEARNING_RATE
from metamorph.training.costs.memory import (
    ENGINES,
    GIB,
    MemoryEstimate,
    MicroBatch,
    estimate_run,
    matrix_bytes_of,
)
from metamorph.training.dry_run.arguments import DryRunArguments
from metamorph.training.engines.prepare import GPU_SHARE
from metamorph.training.load import build_outline
from metamorph.training.optimizer import apply_learning_rate_rule, scale_learning_rate
from metamorph.training.prepare import prepare
from metamorph.training.stages import ModuleSummary, apply_stage, check_learning_rates


MEASURED_SAMPLES = 2048
"""Number of samples to tokenize, for the average length: one second."""
ASSUMED_TEXT_TOKENS = 64
"""Text tokens per image in a packed row, if there are no data to measure."""


@dataclass(frozen=True)
class DataPreview:
    """Size of the data. Averages are over the samples that were tokenized."""

    samples: int
    """Samples of an epoch."""
    measured: int
    """Samples that were tokenized."""
    tokens: float
    """Mean tokens per sample, including images, cut to `model_max_length`."""
    longest: int
    """Tokens of the longest measured sample, cut the same way."""
    images: float
    """Mean images per sample."""
    per_row: float
    """Mean samples per row."""


@dataclass(frozen=True)
class DryRun:
    """Result of [`preview`]."""

    args: RunArguments
    """All flags; `learning_rate` is a number if it can be known."""
    num_gpus: int
    """GPUs of each machine."""
    num_nodes: int
    gpu_memory: float
    """GiB of each GPU."""
    summary: list[ModuleSummary]
    data: DataPreview | None
    """None if the data are missing."""
    batch: MicroBatch
    engine: str
    """One of `metamorph.training.costs.memory.ENGINES`."""
    memory: dict[str, MemoryEstimate]
    """By engine: that of the run, and the others for comparison."""
    learning_rate: str
    """How the learning rate is determined."""
    matrix_bytes: float
    """Bytes of each frozen weight in the decoder's linear layers."""

    @property
    def global_batch(self) -> int:
        """Rows per optimizer step (without packing a row is a sample)."""
        args = self.args.training
        return args.per_device_train_batch_size * args.gradient_accumulation_steps * self.num_gpus * self.num_nodes

    @property
    def steps_per_epoch(self) -> int | None:
        """Optimizer steps of an epoch; None if the data are missing."""
        if self.data is None:
            return None
        rows = math.ceil(self.data.samples / self.data.per_row)
        micro_batch = self.args.training.per_device_train_batch_size * self.num_gpus * self.num_nodes
        return math.ceil(math.ceil(rows / micro_batch) / self.args.training.gradient_accumulation_steps)

    @property
    def steps(self) -> int | None:
        """Optimizer steps of the run; None if the data are missing."""
        args, per_epoch = self.args.training, self.steps_per_epoch
        if per_epoch is None or args.max_steps > 0:
            return None if per_epoch is None else args.max_steps
        return round(per_epoch * args.num_train_epochs)


def preview(args: RunArguments, dry_run: DryRunArguments) -> DryRun:
    """Compute what a run with these flags would do."""
    check_learning_rates(args)
    prepared = prepare(args, for_run=False)
    model = build_outline(args.model, prepared.spec)
    summary = apply_stage(model, args.model)
    # Those of this launch, if none are given.
    world, local = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    num_gpus, num_nodes = dry_run.num_gpus or local, dry_run.num_nodes or max(world // local, 1)
    processes = num_gpus * num_nodes
    engine = _given_engine(args.training)
    shards = shard_group(engine, processes, args.training.dp_replicate)
    data = None if args.data.missing_data is not None else _measure(args, prepared.dataset)
    batch = _micro_batch(args, data)
    memory = {
        name: estimate_run(args, model, name, batch, shards if name == "fsdp2" else processes)
        for name in (("single",) if processes == 1 else ENGINES[1:])
    }
    if processes == 1:
        engine = "single"
    elif engine == "auto":  # shards only what does not fit on one GPU
        engine = "ddp" if memory["ddp"].state <= GPU_SHARE * dry_run.gpu_memory * GIB else "fsdp2"
    return DryRun(
        args=args,
        num_gpus=num_gpus,
        num_nodes=num_nodes,
        gpu_memory=dry_run.gpu_memory,
        summary=summary,
        data=data,
        batch=batch,
        engine=engine,
        memory=memory,
        learning_rate=_learning_rate(args.training, data, processes),
        matrix_bytes=matrix_bytes_of(args),
    )


def _measure(args: RunArguments, dataset: MixtureDataset) -> DataPreview:
    """Tokenize some samples, evenly spaced."""
    indices = np.unique(np.linspace(0, len(dataset) - 1, min(len(dataset), MEASURED_SAMPLES)).astype(int))
    sizes = []
    for index in indices.tolist():
        try:
            source, number = dataset.locate(index)
            sizes.append(source.measure(number))
        except RecordError:  # training reports it, as `--on_bad_record` says
            continue
    if not sizes:
        raise ValueError(f"--data_path {args.data.data_path}: none of {len(indices)} samples can be used")
    lengths = Lengths(*np.array(sizes, dtype=np.int32).T)
    limit = args.data.model_max_length
    planner = BatchPlanner(
        lengths,
        seed=args.data_seed,
        world_size=1,
        rows_per_batch=1,
        max_length=limit,
        packing=args.training.packing,
    )
    tokens = np.minimum(lengths.tokens, limit)
    return DataPreview(
        samples=len(dataset),
        measured=len(sizes),
        tokens=float(tokens.mean()),
        longest=int(tokens.max()),
        images=float(lengths.images.mean()),
        per_row=len(sizes) / planner.num_rows,
    )


def _micro_batch(args: RunArguments, data: DataPreview | None) -> MicroBatch:
    """The largest micro-batch of a GPU: full rows with packing, else rows as long as the longest sample."""
    rows, length, packing = args.training.per_device_train_batch_size, args.data.model_max_length, args.training.packing
    attention = args.model.attn_implementation or "sdpa"
    if data is None:
        per_row = length / (args.model.num_image_tokens + ASSUMED_TEXT_TOKENS) if packing else 1
        images = rows * per_row
    else:
        images = rows * data.per_row * data.images
        length = length if packing else data.longest
    masked = packing and "flash" not in attention and "flex" not in attention
    return MicroBatch(rows=rows, length=length, images=images, block_mask=masked)


def _given_engine(args: MetaMorphTrainingArguments) -> str:
    """The engine that the flags name; a dry run has not set it up."""
    if not args.deepspeed:
        return "fsdp2" if args.fsdp else args.sharding
    config: dict[str, Any] | str = args.deepspeed
    if not isinstance(config, dict):
        try:
            config = json.loads(Path(config).expanduser().read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"--deepspeed {config} is not valid JSON: {error}") from error
    assert isinstance(config, dict)
    check_deepspeed(config)
    zero = config.get("zero_optimization", {})
    if zero.get("stage", 0) < 2:
        return "ddp"
    offload = "offload_optimizer" in zero or "offload_param" in zero
    return f"zero{zero['stage']}" + "_offload" * offload


def _learning_rate(args: MetaMorphTrainingArguments, data: DataPreview | None, processes: int) -> str:
    """Apply the rule if the samples per step are known, and describe the result."""
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
    if args.learning_rate != AUTO_LEARNING_RATE:
        return f"{args.learning_rate:.3g}, {'as given' if args.is_given('learning_rate') else 'the default'}"
    if data is None and args.packing:
        base, base_batch = args.base_learning_rate, args.base_batch_size
        assert base is not None  # checked with the flags
        assert base_batch is not None
        examples = ", ".join(
            f"{scale_learning_rate(base, base_batch, rows * count):.3g} with {count} per row" for count in (1, 8, 32)
        )
        return f"auto: {base:g} × √(samples per step / {base_batch}); with packing, known from the data: {examples}"
    per_row = 1.0 if data is None else data.per_row
    return apply_learning_rate_rule(args, rows * per_row) or ""
