"""Everything about a run that is known without its weights: the model's configuration, the data, the batches."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from metamorph.data.batching.packing import BatchPlanner
from metamorph.data.dataset import MixtureDataset
from metamorph.data.features import FeatureCache
from metamorph.runs.find_checkpoint import ResumePoint
from metamorph.training.arguments import RunArguments
from metamorph.training.build import (
    ModelSpec,
    check_best_metric,
    load_training_data,
    load_validation,
    open_features,
    plan_batches,
    resolve_model,
)
from metamorph.training.checkpoints.resume import find_stage_checkpoint, plan_resume
from metamorph.training.checkpoints.resume_flags import check_flags, flags_of_run
from metamorph.training.engines.prepare import gathered_weights
from metamorph.training.lora import check_engine
from metamorph.training.optimizer import apply_learning_rate_rule, check_optimizer, samples_per_step
from metamorph.training.reporting.benchmarks import Benchmarks, open_benchmarks
from metamorph.training.reporting.samples import SampleWriter, open_samples
from metamorph.training.stages import check_learning_rates


@dataclass
class Preparation:
    """Result of [`prepare`]. The fields below `dataset` are set for a run only."""

    spec: ModelSpec
    dataset: MixtureDataset = field(init=False)
    """Not set in a dry run whose data are missing."""
    features: FeatureCache | None = None
    checkpoint: str | None = None
    """The checkpoint to resume from."""
    validation: MixtureDataset | None = None
    benchmarks: Benchmarks | None = None
    samples: SampleWriter | None = None
    planner: BatchPlanner = field(init=False)
    resume_point: ResumePoint | None = None
    flags: dict[str, Any] = field(init=False)
    """What checkpoints record of the flags."""


def prepare(args: RunArguments, *, for_run: bool = True) -> Preparation:
    """Read configurations, tokenizer and data, and find what is wrong with them before any weights are loaded.

    Raises:
        FileNotFoundError: if a file, a model or a checkpoint is missing.
        ValueError: if flags, parts, data or the checkpoint do not go together; the message names the flag.
    """
    checkpoint = None
    if for_run:
        check_engine(args)
        check_learning_rates(args)
        check_optimizer(args.training)
        checkpoint = find_stage_checkpoint(
            args.training.output_dir, args.training.resume_from_checkpoint, args.model.stage, args.model.lora_enable
        )
    with gathered_weights(args.training):
        prepared = Preparation(resolve_model(args.model, args.image_aspect_ratio, checkpoint), checkpoint=checkpoint)
    if for_run:
        prepared.features = open_features(args, prepared.spec)
    if args.data.missing_data is None:
        prepared.dataset = load_training_data(args, prepared.spec.processor, prepared.features)
    if not for_run:
        return prepared
    prepared.validation = load_validation(args, prepared.spec)
    prepared.benchmarks = open_benchmarks(args.training, can_draw=prepared.spec.config.use_vision_ar)
    prefixes = {} if prepared.benchmarks is None else prepared.benchmarks.headlines
    check_best_metric(args.training, prepared.validation, prefixes, prepared.spec.config.use_vision_ar)
    prepared.samples = open_samples(args.training)
    prepared.planner = planner = plan_batches(args, prepared.dataset)
    prepared.resume_point = plan_resume(prepared.checkpoint, prepared.dataset, planner, args.training)
    apply_learning_rate_rule(args.training, samples_per_step(planner, args.training.gradient_accumulation_steps))
    prepared.flags = flags_of_run(args, prepared.spec)
    check_flags(prepared.checkpoint, prepared.flags, args.training.allow_changes)
    return prepared
