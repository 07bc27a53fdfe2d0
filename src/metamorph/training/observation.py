"""What of a run is looked at while it learns: validation data, fixed prompts, trackers. Opened before any weights."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from metamorph.data.dataset import MixtureDataset
from metamorph.evaluation.losses import metric_names
from metamorph.models.processing_metamorph import MetaMorphProcessor
from metamorph.training.arguments.training import DataArguments, MetaMorphTrainingArguments
from metamorph.training.build import _check_validation, _load_validation
from metamorph.training.reporting.samples import Draw, SamplePrompt, SampleWriter, read_prompts
from metamorph.training.reporting.trackers import set_up_trackers


if TYPE_CHECKING:
    from metamorph.training.trainer import MetaMorphTrainer

OpenVisualizer = Callable[[str], Draw]
"""Opens the visualizer in a folder. Training does not import it: `metamorph train` hands it over."""


@dataclass(frozen=True)
class Observation:
    """What [`observe`] has opened."""

    validation: MixtureDataset | None
    """Data that are not trained on."""
    prompts: list[SamplePrompt]
    """What is answered every `sample_steps` steps; empty for nothing."""
    draw: Draw | None
    """Draws the pictures of the answers; on the main process only."""

    def attach(self, trainer: MetaMorphTrainer, args: MetaMorphTrainingArguments) -> None:
        """Connect the trackers and the prompts to a trainer that was made with the same flags.

        Args:
            trainer: Before training.
            args: Flags of the run.
        """
        trackers = set_up_trackers(trainer.callback_handler.callbacks, args.output_dir)
        if args.sample_steps is not None:
            trainer.add_callback(SampleWriter(trainer, self.prompts, args.sample_steps, trackers, self.draw))


def observe(
    data_args: DataArguments,
    args: MetaMorphTrainingArguments,
    processor: MetaMorphProcessor,
    open_visualizer: OpenVisualizer | None = None,
    visual_loss: bool = True,
) -> Observation:
    """Open what the flags ask to look at.

    Args:
        data_args: `eval_data_path` and how records are read.
        args: `eval_strategy`, `sample_…`.
        processor: Makes the sequences.
        open_visualizer: Opens `sample_visualizer`.
        visual_loss: Whether the model has one, `use_vision_ar`.

    Raises:
        DataError: If validation data are unusable.
        FileNotFoundError: If a file of the prompts is missing.
        ValueError: If flags contradict each other, a prompt is not valid, or the visualizer cannot be opened.
    """
    _check_validation(data_args, args)
    prompts = read_prompts(args.sample_prompts) if args.sample_prompts is not None else []
    draw = None
    if args.sample_visualizer is not None:
        if open_visualizer is None:
            raise ValueError(
                f"--sample_visualizer {args.sample_visualizer}: run_training does not know how to open it; pass "
                "open_visualizer=metamorph.inference.draw.open_visualizer"
            )
        draw = open_visualizer(args.sample_visualizer) if args.process_index == 0 else None
    validation = _load_validation(data_args, args, processor)
    if validation is not None:
        _check_best_metric(args, validation, visual_loss)
    return Observation(validation, prompts, draw)


def _check_best_metric(args: MetaMorphTrainingArguments, validation: MixtureDataset, visual_loss: bool) -> None:
    """Trainer would look for it after the first evaluation."""
    if args.metric_for_best_model is None:
        return
    name = f"eval_{args.metric_for_best_model.removeprefix('eval_')}"
    known = metric_names(validation.sources, visual_loss=visual_loss)
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {nearest[0]!r}? " if nearest else ""
        raise ValueError(
            f"--metric_for_best_model {args.metric_for_best_model} is not measured: {hint}Use one of {', '.join(known)}"
        )
