"""A training run from beginning to end: arguments, model, data, trainer, saved result."""

import dataclasses
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import set_seed

from metamorph.data.batching.collation import PackedCollator, PaddedCollator
from metamorph.models.embeddings import merge_new_token_rows
from metamorph.models.modeling_metamorph import MetaMorphForConditionalGeneration
from metamorph.models.processing_metamorph import MetaMorphProcessor
from metamorph.runs.checkpoint_files import explains_write_errors
from metamorph.runs.lock import check_lock
from metamorph.runs.open_run import open_run
from metamorph.runs.preemption import Preemption
from metamorph.training.arguments import DataArguments, MetaMorphTrainingArguments, ModelArguments
from metamorph.training.build import (
    load_model,
    load_training_data,
    load_validation,
    make_plan,
    open_features,
    plan_run,
    runs_tower,
)
from metamorph.training.checkpoints.resume import find_checkpoint, plan_resume
from metamorph.training.checkpoints.resume_flags import check_flags, flags_of_run
from metamorph.training.engines.attention import check_keeps_samples_apart, choose_attention, uses_flash_attention
from metamorph.training.engines.prepare import prepare_engine, whole_weights
from metamorph.training.engines.speed import prepare_speed
from metamorph.training.lora import check_engine, compute_dtype, store_frozen_matrices
from metamorph.training.optimizer import (
    apply_learning_rate_rule,
    check_optimizer,
    format_summary,
    samples_in_a_step,
)
from metamorph.training.reporting.model_card import CardFacts
from metamorph.training.reporting.samples import open_samples
from metamorph.training.stages import apply_stage, check_learning_rates
from metamorph.training.trainer import MetaMorphTrainer


logger = logging.getLogger(__name__)


@dataclass
class TrainResult:
    """What a run leaves."""

    output_dir: str
    """Stage 1: folder with `mm_projector.safetensors`. Stage 2: folder that `from_pretrained` opens."""
    stage: int
    """1 or 2."""
    global_step: int
    """Optimizer steps done, those before a resume included."""
    metrics: dict[str, float]
    """Final numbers: `train_loss`, `train_runtime` in seconds, ..."""
    log_history: list[dict[str, Any]]
    """Every log line: `step`, `loss`, `text_loss`, `visual_loss`, `visual_cosine`, `learning_rate`, ..."""
    model: MetaMorphForConditionalGeneration
    """The trained model, with a plain embedding table. After an engine has sharded it, of no use: open `output_dir`."""
    processor: MetaMorphProcessor
    """Its processor."""
    data_statistics: dict[str, Any]
    """What was met in the data, each record counted once: `records` in the files, `bad` ones by kind (skipped, on all
    ranks), and of this process `truncated` ones (cut to `model_max_length`) and `dropped_images` (cut off with them);
    the same for each source by its name, under `sources`."""
    is_main_process: bool
    """Whether this process wrote the result."""


def run_training(
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: MetaMorphTrainingArguments,
    callbacks: list[Any] | None = None,
) -> TrainResult:
    """Train stage 1 or stage 2. `metamorph train` is this function with flags.

    What can be wrong with the input is found before the weights are loaded. While it runs in the main thread, SIGUSR1,
    SIGTERM and Ctrl-C let it save and stop at the next step. On a CPU, and elsewhere with `full_determinism`, PyTorch
    computes with deterministic algorithms; its settings are restored at the end.

    Args:
        model_args: What the network is, and the stage.
        data_args: What it learns from.
        training_args: How it learns.
        callbacks: `transformers.TrainerCallback` objects, for example a progress display.

    Returns:
        The result, also in memory.

    Raises:
        CheckpointError: If another run uses the output folder.
        Preempted: If a signal has stopped it.
        Interrupted: If Ctrl-C has; a checkpoint was saved.
    """
    with open_run(training_args) as preemption:
        return _train(model_args, data_args, training_args, callbacks, preemption)


def _train(
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: MetaMorphTrainingArguments,
    callbacks: list[Any] | None,
    preemption: Preemption,
) -> TrainResult:
    # 1. Everything that can be checked without weights.
    check_engine(model_args, training_args)
    check_learning_rates(model_args, training_args)
    check_optimizer(training_args)
    checkpoint = find_checkpoint(
        training_args.output_dir, training_args.resume_from_checkpoint, model_args.stage, model_args.lora_enable
    )
    aspect_ratio = data_args.image_aspect_ratio if data_args.is_given("image_aspect_ratio") else None
    with whole_weights(training_args):
        plan = make_plan(model_args, aspect_ratio, checkpoint)
    data_seed = training_args.seed if training_args.data_seed is None else training_args.data_seed
    features = open_features(model_args, data_args, plan)
    dataset = load_training_data(data_args, plan.processor, data_seed, features)
    validation = load_validation(data_args, training_args, plan.processor, plan.config.use_vision_ar)
    samples = open_samples(training_args)
    planner = plan_run(dataset, data_args.model_max_length, training_args)
    resume_point = plan_resume(checkpoint, dataset, planner, training_args)
    apply_learning_rate_rule(training_args, samples_in_a_step(planner, training_args.gradient_accumulation_steps))
    flags = flags_of_run(model_args, data_args, training_args, plan)
    check_flags(checkpoint, flags, training_args.allow_changes)

    # 2. The model, and the part of it that this stage trains.
    set_seed(training_args.seed)  # the connector and the vision head start at random
    with whole_weights(training_args):
        model = load_model(model_args, plan, compute_dtype(training_args))
    if features is not None:
        features.check_weights(model.model.vision_tower)
    summary = apply_stage(model, model_args)
    engine = prepare_engine(training_args, model)
    store_frozen_matrices(model, training_args)
    logger.info("stage %d trains (%s):\n%s", model_args.stage, engine, format_summary(summary, training_args))
    if planner.packing:
        check_keeps_samples_apart(model)
    choose_attention(model, model_args, training_args)
    image_token_id = model.config.image_token_id
    collator: PackedCollator | PaddedCollator = PaddedCollator(plan.processor.pad_token_id, image_token_id)
    if planner.packing:
        collator = PackedCollator(plan.processor.pad_token_id, uses_flash_attention(model), image_token_id)
    prepare_speed(model, training_args)

    # 3. Training.
    trainer = MetaMorphTrainer(
        stage=model_args.stage,
        planner=planner,
        model=model,
        args=training_args,
        train_dataset=dataset,
        eval_dataset=validation,
        data_collator=collator,
        processing_class=plan.processor,
        callbacks=callbacks,
        tower_on_device=runs_tower(data_args, training_args),
    )
    if samples is not None:
        samples.attach(trainer, trainer.trackers)
    trainer.flags = flags
    result = trainer.run(checkpoint, resume_point, dataset.limit, preemption)

    # 4. The result.
    statistics = dataset.statistics()
    trainer.card_facts = CardFacts(model_args, data_args, training_args, statistics)
    _save_result(trainer, model_args, data_args)
    logger.info(
        "data: %d records, of which %d cut to --model_max_length %d (%d images dropped) and %d skipped as bad%s",
        statistics["records"],
        statistics["truncated"],
        data_args.model_max_length,
        statistics["dropped_images"],
        sum(statistics["bad"].values()),
        f": {statistics['bad']}" if statistics["bad"] else "",
    )
    return TrainResult(
        output_dir=training_args.output_dir,
        stage=model_args.stage,
        global_step=result.global_step,
        metrics=result.metrics,
        log_history=trainer.state.log_history,
        model=model,
        processor=plan.processor,
        data_statistics=statistics,
        is_main_process=trainer.is_world_process_zero(),
    )


def _save_result(trainer: MetaMorphTrainer, model_args: ModelArguments, data_args: DataArguments) -> None:
    """Write state, flags, card and weights, and leave a plain model in memory where the engine allows it."""
    check_lock(trainer.args.output_dir)
    with explains_write_errors(trainer.args.output_dir, "the result"):
        trainer.save_state()
        if trainer.is_world_process_zero():
            save_arguments(trainer.args.output_dir, model_args, data_args)
        trainer.create_model_card()
        trainer.save_model()  # with --push_to_hub also there, and with all of the above
    trainer.accelerator.wait_for_everyone()
    trainer.release_tower()
    if not trainer.is_sharded:
        merge_new_token_rows(trainer.plain_model)


def save_arguments(output_dir: str, model_args: ModelArguments, data_args: DataArguments) -> None:
    """Write the model and data flags beside the result; the trainer writes its own to training_args.json.

    Args:
        output_dir: Folder of the result.
        model_args: Model flags.
        data_args: Data flags.
    """
    values = {**dataclasses.asdict(model_args), **dataclasses.asdict(data_args)}
    path = Path(output_dir) / "model_and_data_args.json"
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
