"""Benchmarks during training: subsets of those of `metamorph evaluate`, run by the same code at every evaluation."""

from __future__ import annotations

import logging
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers.integrations import is_deepspeed_zero3_enabled

from metamorph.evaluation.benchmarks.run import run_spec
from metamorph.evaluation.benchmarks.spec import SpecChoice
from metamorph.flags.checks import errors_name_flag
from metamorph.inference.answer_files import TOKENS_SUFFIX
from metamorph.inference.session import Session, load_pipeline
from metamorph.runs.checkpoint_files import on_first_process
from metamorph.training.arguments import MetaMorphTrainingArguments


if TYPE_CHECKING:
    from metamorph.training.trainer import MetaMorphTrainer
    from metamorph.visualization.pipeline import VisualizationPipeline


logger = logging.getLogger(__name__)


def open_benchmarks(args: MetaMorphTrainingArguments, *, can_draw: bool) -> Benchmarks | None:
    """The benchmarks of `--eval_specs`, their data checked, with the visualizer; None without the flag.

    Raises:
        ValueError: If a benchmark, its data, the model or the engine do not go together.
    """
    if not args.eval_specs:
        return None
    _check_engine(args)
    choices = [_open(text, args, can_draw=can_draw) for text in args.eval_specs]
    names = [choice.spec.name for choice in choices]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(
            f"--eval_specs {' '.join(args.eval_specs)} has two benchmarks named {twice}: give a copy of its file "
            "another name"
        )
    if args.eval_visualizer is not None and not any(choice.spec.draws for choice in choices):
        raise ValueError(f"--eval_visualizer {args.eval_visualizer} has no effect: --eval_specs judge text; drop it")
    for choice in choices:
        best = f"{choice.spec.name}_{choice.spec.metric.headline}"
        if choice.spec.metric.lower_is_better and (args.metric_for_best_model or "").removeprefix("eval_") == best:
            args.greater_is_better = False
    pipeline = None
    if args.eval_visualizer is not None:
        pipeline = load_pipeline(args.eval_visualizer, flag="--eval_visualizer")
    return Benchmarks(choices, args.eval_visualizer, pipeline)


def _open(text: str, args: MetaMorphTrainingArguments, *, can_draw: bool) -> SpecChoice:
    with errors_name_flag("--eval_specs", text):
        choice = SpecChoice.parse(text)
        spec = choice.spec
        if spec.metric.needs_images and args.eval_visualizer is None:
            raise ValueError(f"{spec.name} judges images: give the --eval_visualizer that draws them")
        if not can_draw and (spec.decoding.draw or spec.metric.needs_images):
            raise ValueError(f"{spec.name} needs images, but the model is trained without --use_vision_ar")
        choice.load()
    return choice


def _check_engine(args: MetaMorphTrainingArguments) -> None:
    """Answers have different lengths, so processes that share them cannot gather weights in every step."""
    if args.fsdp or is_deepspeed_zero3_enabled():
        raise ValueError(
            f"--eval_specs {' '.join(args.eval_specs or ())} needs all weights on each device, but FSDP2 and ZeRO-3 "
            "divide them: use --sharding ddp or zero2, or run metamorph evaluate on the checkpoints"
        )


@dataclass
class Benchmarks:
    """Runs benchmarks with the model in training, into `output_dir`/eval/SPEC/step-N. Processes share the prompts."""

    choices: Sequence[SpecChoice]
    visualizer: str | None = None
    pipeline: VisualizationPipeline | None = None
    trainer: MetaMorphTrainer = field(init=False)

    @property
    def headlines(self) -> dict[str, str]:
        """Prefixes of the metrics, `eval_SPEC_`, and the main figure of each benchmark."""
        return {f"eval_{choice.spec.name}_": choice.spec.metric.headline for choice in self.choices}

    def attach(self, trainer: MetaMorphTrainer) -> None:
        """Become the benchmarks of the trainer, whose engine is known now."""
        _check_engine(trainer.args)
        self.trainer = trainer
        trainer.benchmarks = self

    def measure(self, prefix: str = "eval") -> dict[str, float]:
        """The figures of all benchmarks, `eval_SPEC_FIGURE`. Every process must call it; nothing random changes."""
        trainer = self.trainer
        session = Session(trainer.plain_model, trainer.processing_class, self.pipeline)
        metrics: dict[str, float] = {}
        if self.pipeline is not None:
            self.pipeline.to(trainer.args.device)
        try:
            with _same_random_state(trainer.args.device), trainer.accelerator.autocast():
                for choice in self.choices:
                    metrics |= self._run(choice, session, prefix)
        finally:
            if self.pipeline is not None:
                self.pipeline.to("cpu")  # its memory is needed for training
        return on_first_process(lambda: metrics)

    def _run(self, choice: SpecChoice, session: Session, prefix: str) -> dict[str, float]:
        """Run one benchmark; the figures are those of the first process, and empty on the others."""
        args, spec, step = self.trainer.args, choice.spec, self.trainer.state.global_step
        folder, began = Path(str(args.output_dir), "eval", spec.name, f"step-{step}"), time.perf_counter()
        # Answers of this step are from weights that an interrupted run has lost.
        on_first_process(lambda: shutil.rmtree(folder, ignore_errors=True))
        result = run_spec(
            spec,
            f"step-{step}",
            self.visualizer if spec.draws else None,
            folder,
            lambda: session,
            data_path=choice.path,
            batch_size=args.per_device_eval_batch_size,
            limit=choice.limit,
            dtype="bfloat16" if args.bf16 else "float16" if args.fp16 else "float32",
            device=args.device,
        )
        if not result:
            return {}
        for file in (folder / "answers").glob(f"*{TOKENS_SUFFIX}"):  # large, and compared
            file.unlink()
        headline = result["summary"].get(spec.metric.headline)
        if headline is not None:
            logger.info("step %d: %s %s %.4f", step, spec.name, spec.metric.headline, headline["value"])
        if result["errors"]:
            logger.warning("step %d: %d answers of %s are errors, see %s", step, result["errors"], spec.name, folder)
        figures = {f"{prefix}_{spec.name}_{name}": figure["value"] for name, figure in result["summary"].items()}
        return figures | {f"{prefix}_{spec.name}_runtime": round(time.perf_counter() - began, 3)}


@contextmanager
def _same_random_state(device: torch.device) -> Iterator[None]:
    """Restore the generators of Python, NumPy and PyTorch: metrics may use them, and training must not notice."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the global one
    devices = [device] if device.type not in ("cpu", "mps") else []
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
