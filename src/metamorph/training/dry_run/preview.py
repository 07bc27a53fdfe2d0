"""What a run would do: `metamorph train --dry-run`, from configurations alone, without weights and without GPUs."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import numpy as np
import torch
from transformers import AutoModel, AutoModelForCausalLM

from metamorph.data.batching.lengths import Lengths
from metamorph.data.batching.packing import BatchPlanner
from metamorph.data.records import RecordError
from metamorph.models.modeling_metamorph import MetaMorphForConditionalGeneration
from metamorph.models.pretrained import load_tokenizer
from metamorph.training.arguments import ModelArguments
from metamorph.training.arguments.training import AUTO_LEARNING_RATE
from metamorph.training.build import Plan, config_overrides, load_training_data, make_plan, runs_tower
from metamorph.training.costs.memory import (
    ENGINES,
    GIB,
    MemoryEstimate,
    MicroBatch,
    estimate_memory,
    matrix_bytes_of,
    optimizer_bytes_of,
)
from metamorph.training.dry_run.arguments import (
    DryRunArguments,
    PreviewDataArguments,
    PreviewModelArguments,
    PreviewTrainingArguments,
)
from metamorph.training.engines.prepare import GPU_SHARE
from metamorph.training.optimizer import apply_learning_rate_rule, scale_learning_rate
from metamorph.training.stages import ModuleSummary, apply_stage, check_learning_rates


MEASURED_SAMPLES = 2048
"""Samples that are tokenized to know what a row holds: one second."""
ASSUMED_TEXT_TOKENS = 64
"""Tokens of text beside each image in a packed row, where no data tell how many images it holds."""


@dataclass(frozen=True)
class DataPreview:
    """What the data look like; averages are of a part of them."""

    samples: int
    """Samples of an epoch."""
    measured: int
    """Samples that were tokenized."""
    tokens: float
    """Mean tokens of a sample, images included, cut to `model_max_length`."""
    longest: int
    """Most tokens of a measured sample, cut likewise."""
    images: float
    """Mean images of a sample."""
    per_row: float
    """Mean samples of a row."""


@dataclass(frozen=True)
class DryRun:
    """All that [`preview`] found out."""

    model_args: PreviewModelArguments
    """The model flags."""
    data_args: PreviewDataArguments
    """The data flags."""
    training_args: PreviewTrainingArguments
    """The training flags; `learning_rate` is a number if it can be known."""
    num_gpus: int
    """GPUs of each machine."""
    num_nodes: int
    """Machines."""
    gpu_memory: float
    """GiB of each GPU."""
    summary: list[ModuleSummary]
    """What is trained."""
    data: DataPreview | None
    """The data, if they are there."""
    batch: MicroBatch
    """Micro-batch of one GPU."""
    engine: str
    """One of `metamorph.training.costs.memory.ENGINES`."""
    memory: dict[str, MemoryEstimate]
    """By engine: the one of the run, and the others for comparison."""
    learning_rate: str
    """How the learning rate comes about."""
    matrix_bytes: float
    """Bytes of each frozen weight of the decoder's linear layers."""

    @property
    def global_batch(self) -> int:
        """The guide's formula: rows of an optimizer step (without packing a row is a sample)."""
        args = self.training_args
        per_gpu = args.per_device_train_batch_size * args.gradient_accumulation_steps
        return per_gpu * self.num_gpus * self.num_nodes

    @property
    def steps_per_epoch(self) -> int | None:
        """Optimizer steps of an epoch, if the data are there."""
        return None if self.data is None else _steps(self.data, self.training_args, self.num_gpus * self.num_nodes)


def preview(
    model_args: PreviewModelArguments,
    data_args: PreviewDataArguments,
    training_args: PreviewTrainingArguments,
    dry_run_args: DryRunArguments,
) -> DryRun:
    """Work out what a run with these flags would do.

    Args:
        model_args: What the network is, and the stage.
        data_args: What it learns from.
        training_args: How it learns; `learning_rate` is replaced where it is `auto` and can be known.
        dry_run_args: What to plan for.

    Raises:
        FileNotFoundError: if a configuration or a tokenizer is missing.
        ValueError: if the parts do not go together; the message names the flag.
    """
    check_learning_rates(model_args, training_args)
    aspect_ratio = data_args.image_aspect_ratio if data_args.is_given("image_aspect_ratio") else None
    plan = make_plan(model_args, aspect_ratio)
    model = build_outline(model_args, plan)
    summary = apply_stage(model, model_args)
    num_gpus, num_nodes = _processes(dry_run_args)
    processes = num_gpus * num_nodes
    data = _look_at_data(data_args, training_args, plan)
    batch = _micro_batch(model_args, data_args, training_args, data)
    compute = 2 if training_args.bf16 or training_args.fp16 else 4
    matrix_bytes = matrix_bytes_of(
        model_args.bits, lora=model_args.lora_enable, double_quant=model_args.double_quant, compute=compute
    )
    memory = {
        engine: estimate_memory(
            model,
            engine,
            batch,
            num_processes=processes,
            bf16=compute == 2,
            recompute=recomputed(training_args),
            all_logits=training_args.text_loss == "full",
            optimizer_bytes=optimizer_bytes_of(training_args.optim),
            matrix_bytes=matrix_bytes,
            tower_on_gpu=runs_tower(data_args, training_args),
        )
        for engine in (("single",) if processes == 1 else ENGINES[1:])
    }
    engine = _engine(training_args.planned_engine, memory, dry_run_args.gpu_memory)
    return DryRun(
        model_args=model_args,
        data_args=data_args,
        training_args=training_args,
        num_gpus=num_gpus,
        num_nodes=num_nodes,
        gpu_memory=dry_run_args.gpu_memory,
        summary=summary,
        data=data,
        batch=batch,
        engine=engine,
        memory=memory,
        learning_rate=_learning_rate(training_args, data, processes),
        matrix_bytes=matrix_bytes,
    )


def recomputed(args: PreviewTrainingArguments) -> str:
    """What `--recompute` is, also where Transformers' own flag says it."""
    theirs = args.gradient_checkpointing or getattr(args, "activation_checkpointing", False)  # from 5.23 on
    return "full" if theirs and args.recompute == "none" else args.recompute


def _processes(args: DryRunArguments) -> tuple[int, int]:
    """GPUs of each machine, and machines: those asked for, else those of this launch."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    nodes = int(os.environ.get("WORLD_SIZE", "1")) // local
    return args.num_gpus or local, args.num_nodes or max(nodes, 1)


def _look_at_data(
    data_args: PreviewDataArguments, training_args: PreviewTrainingArguments, plan: Plan
) -> DataPreview | None:
    """Open the data and tokenize some samples, evenly spaced; None if there are none."""
    if data_args.missing_data is not None:
        return None
    seed = training_args.seed if training_args.data_seed is None else training_args.data_seed
    dataset = load_training_data(data_args, plan.processor, seed)
    indices = np.unique(np.linspace(0, len(dataset) - 1, min(len(dataset), MEASURED_SAMPLES)).astype(int))
    sizes = []
    for index in indices.tolist():
        try:
            sizes.append(dataset.measure(index))
        except RecordError:  # training reports it by its own rules
            continue
    if not sizes:
        raise ValueError(f"--data_path {data_args.data_path}: none of {len(indices)} samples can be used")
    lengths = Lengths(*np.array(sizes, dtype=np.int32).T)
    limit = data_args.model_max_length
    planner = BatchPlanner(
        lengths, seed=seed, world_size=1, rows_per_batch=1, max_length=limit, packing=training_args.packing
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


def _micro_batch(
    model_args: PreviewModelArguments,
    data_args: PreviewDataArguments,
    training_args: PreviewTrainingArguments,
    data: DataPreview | None,
) -> MicroBatch:
    """The largest micro-batch of a GPU: full rows with packing, else rows as long as the longest sample."""
    rows, length = training_args.per_device_train_batch_size, data_args.model_max_length
    attention = model_args.attn_implementation or "sdpa"
    if data is None:
        per_row = length / (model_args.num_image_tokens + ASSUMED_TEXT_TOKENS) if training_args.packing else 1
        images = rows * per_row
    else:
        images = rows * data.per_row * data.images
        length = length if training_args.packing else data.longest
    masked = training_args.packing and "flash" not in attention and "flex" not in attention
    return MicroBatch(rows=rows, length=length, images=images, block_mask=masked)


def _engine(asked: str, memory: dict[str, MemoryEstimate], gpu_memory: float) -> str:
    """What `--sharding` comes to: `auto` shards only what one GPU cannot hold."""
    if "single" in memory:
        return "single"
    if asked != "auto":
        return asked
    return "ddp" if memory["ddp"].state <= GPU_SHARE * gpu_memory * GIB else "fsdp2"


def _learning_rate(args: PreviewTrainingArguments, data: DataPreview | None, processes: int) -> str:
    """Apply the rule if it can be applied, and say how."""
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
    if args.learning_rate != AUTO_LEARNING_RATE:
        return f"{args.learning_rate:.3g}, {'as given' if args.is_given('learning_rate') else 'the default'}"
    if data is None and args.packing:
        base, base_batch = args.base_learning_rate, args.base_batch_size
        assert base is not None  # checked with the flags
        assert base_batch is not None
        examples = ", ".join(
            f"{scale_learning_rate(base, base_batch, rows * count):.3g} if a row holds {count}" for count in (1, 8, 32)
        )
        return f"auto: {base:g} × √(samples in a step / {base_batch}), with packing known from the data: {examples}"
    per_row = 1.0 if data is None else data.per_row
    return apply_learning_rate_rule(args, rows * per_row) or ""


def _steps(data: DataPreview, args: PreviewTrainingArguments, processes: int) -> int:
    rows = math.ceil(data.samples / data.per_row)
    batches = math.ceil(rows / (args.per_device_train_batch_size * processes))
    return math.ceil(batches / args.gradient_accumulation_steps)


def build_outline(args: ModelArguments, plan: Plan) -> MetaMorphForConditionalGeneration:
    """Compose the model as `load_model` would, in float32, on PyTorch's meta device; no weight file is opened.

    It can be counted, frozen by `apply_stage` and wrapped, but not run.

    Args:
        args: The model flags.
        plan: Result of `make_plan` for the same flags.
    """
    with torch.device("meta"):
        if plan.continues:
            return MetaMorphForConditionalGeneration(plan.config).float()
        language_model = AutoModelForCausalLM.from_config(
            plan.config.text_config, dtype=torch.float32, trust_remote_code=False
        )
        vision_encoder = AutoModel.from_config(plan.config.vision_config, dtype=torch.float32, trust_remote_code=False)
        # The processor's tokenizer has the image tokens already; the language model grows by them as in a run.
        tokenizer = load_tokenizer(args.model_name_or_path)
        return MetaMorphForConditionalGeneration.from_parts(
            language_model, vision_encoder, tokenizer, **config_overrides(args)
        )
