"""A training run from beginning to end: arguments, model, data, trainer, saved result."""

import logging
from dataclasses import dataclass
from typing import Any

from metamorph.models.modeling_metamorph import MetaMorphForConditionalGeneration
from metamorph.models.processing_metamorph import MetaMorphProcessor
from metamorph.runs.open_run import open_run
from metamorph.training.arguments import DataArguments, MetaMorphTrainingArguments, ModelArguments, RunArguments
from metamorph.training.build import build_collator
from metamorph.training.engines.prepare import prepare_model
from metamorph.training.load import load_for_engine
from metamorph.training.optimizer import format_summary
from metamorph.training.prepare import Preparation, prepare
from metamorph.training.reporting.model_card import CardFacts
from metamorph.training.stages import apply_stage
from metamorph.training.trainer import MetaMorphTrainer


logger = logging.getLogger(__name__)


@dataclass
class TrainResult:
    """Result of [`run_training`]."""

    output_dir: str
    """Stage 1: folder with `mm_projector.safetensors`. Stage 2: folder that `from_pretrained` opens."""
    stage: int
    """1 or 2."""
    global_step: int
    """Optimizer steps, including those before a resume."""
    metrics: dict[str, float]
    """Final numbers: `train_loss`, `train_runtime` in seconds, ..."""
    log_history: list[dict[str, Any]]
    """Every log line: `step`, `loss`, `text_loss`, `visual_loss`, `visual_cosine`, `learning_rate`, ..."""
    model: MetaMorphForConditionalGeneration
    """The trained model, with a plain embedding table. Unusable after an engine has sharded it: open `output_dir`."""
    processor: MetaMorphProcessor
    """Its processor."""
    data_statistics: dict[str, Any]
    """Statistics of the records, each counted once: `records` in the files, `bad` ones by kind (skipped, on all ranks),
    and, for this process, `truncated` ones (cut to `model_max_length`) and `dropped_images` (lost by it). The same for
    each source by its name, under `sources`."""
    is_main_process: bool
    """Whether this process wrote the result."""


def run_training(
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: MetaMorphTrainingArguments,
    callbacks: list[Any] | None = None,
) -> TrainResult:
    """Train stage 1 or stage 2. `metamorph train` is this function with flags.

    Wrong input is found before the weights are loaded. In the main thread, SIGUSR1, SIGTERM and Ctrl-C make the run
    save a checkpoint and stop at the next step. On a CPU, and elsewhere with `full_determinism`, PyTorch uses
    deterministic algorithms; its settings are restored at the end.

    Args:
        model_args: The network, and which parts of it are trained.
        data_args: Training and validation data.
        training_args: How the model is trained.
        callbacks: `transformers.TrainerCallback` objects, for example a progress display.

    Raises:
        CheckpointError: if another run uses the output folder.
        Preempted: if a signal has stopped the run.
        Interrupted: if Ctrl-C has stopped it; a checkpoint was saved.
    """
    args = RunArguments(model_args, data_args, training_args)
    with open_run(training_args) as preemption:
        prepared = prepare(args)
        trainer = _build_trainer(args, prepared, callbacks)
        result = trainer.run(prepared.checkpoint, prepared.resume_point, prepared.dataset.limit, preemption)
        statistics = prepared.dataset.statistics()
        trainer.card_facts = CardFacts(model_args, data_args, training_args, statistics)
        trainer.save_result(args)
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
        model=trainer.plain_model,
        processor=prepared.spec.processor,
        data_statistics=statistics,
        is_main_process=trainer.is_world_process_zero(),
    )


def _build_trainer(args: RunArguments, prepared: Preparation, callbacks: list[Any] | None) -> MetaMorphTrainer:
    """Load the model, freeze what the stage does not train, and make the trainer."""
    model, engine = load_for_engine(args, prepared.spec)
    if prepared.features is not None:
        prepared.features.check_weights(model.model.vision_tower)
    summary = apply_stage(model, args.model)
    prepare_model(model, args)
    logger.info("stage %d trains (%s):\n%s", args.model.stage, engine, format_summary(summary, args.training))
    trainer = MetaMorphTrainer(
        stage=args.model.stage,
        planner=prepared.planner,
        model=model,
        args=args.training,
        train_dataset=prepared.dataset,
        # Trainer refuses to evaluate without data, which benchmarks have themselves.
        eval_dataset=[] if prepared.validation is None and prepared.benchmarks else prepared.validation,
        data_collator=build_collator(model, prepared.spec.processor, packing=args.training.packing),
        processing_class=prepared.spec.processor,
        callbacks=callbacks,
        tower_on_device=args.encodes_images,
    )
    trainer.flags = prepared.flags
    if prepared.benchmarks is not None:
        prepared.benchmarks.attach(trainer)
    if prepared.samples is not None:
        prepared.samples.attach(trainer)
    return trainer
