"""Trains the visualizer: arguments → parts → data → loop → pipeline folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from metamorph.runs.checkpoint_files import clean_up
from metamorph.runs.determinism import deterministic_algorithms
from metamorph.runs.lock import only_run_in
from metamorph.runs.preemption import Preemption, clear_marker
from metamorph.visualization.token_options import adopt_token_options
from metamorph.visualizer_training.arguments import VisualizerArguments
from metamorph.visualizer_training.build import adopt_resolution, check_folders
from metamorph.visualizer_training.checkpoints import find_checkpoint, load_checkpoint
from metamorph.visualizer_training.pictures.bad_pictures import BadPictures
from metamorph.visualizer_training.pictures.shards import report_shards
from metamorph.visualizer_training.pictures.sources import ImageList, ImageSource, open_pictures, shards_of
from metamorph.visualizer_training.processes import start_accelerate, start_trackers
from metamorph.visualizer_training.resume_flags import check_flags, flags_of_run
from metamorph.visualizer_training.trainer import StepCallback, VisualizerResult, VisualizerTrainer


__all__ = ["StepCallback", "VisualizerResult", "VisualizerTrainer", "open_source", "train_visualizer"]


def train_visualizer(
    args: VisualizerArguments,
    images: Sequence[Image.Image] | None = None,
    on_log: StepCallback | None = None,
) -> VisualizerResult:
    """Train a visualizer and write it as a diffusers pipeline to `args.output_dir`.

    While it runs in the main thread, SIGUSR1, SIGTERM and Ctrl-C let it save and stop at the next step. On a CPU, and
    elsewhere with `full_determinism`, PyTorch computes with deterministic algorithms; its settings are restored at the
    end.

    Args:
        args: The flags.
        images: Pictures in memory, in place of `image_folder` and `image_jsons`.
        on_log: Called in the main process every `logging_steps` steps.

    Raises:
        ValueError: for parts, data or checkpoints that do not fit, or another run in the output folder, before training
            starts.
        Preempted: if a signal has stopped it.
        Interrupted: if Ctrl-C has; a checkpoint was saved.
    """
    with Preemption() as preemption:
        return _train(args, images, on_log, preemption)


def _train(
    args: VisualizerArguments,
    images: Sequence[Image.Image] | None,
    on_log: StepCallback | None,
    preemption: Preemption,
) -> VisualizerResult:
    check_folders(args)
    resolution_is_given = args.resolution is not None
    args = adopt_resolution(adopt_token_options(args))
    source = open_source(args, images)
    shards = shards_of(source)
    bad_pictures = BadPictures(len(source), args.on_bad_image, args.max_bad_fraction)
    output_dir = Path(args.output_dir).expanduser()
    accelerator = start_accelerate(args)
    deterministic = deterministic_algorithms(accelerator.device, full=args.full_determinism, seed=args.seed)
    with only_run_in(output_dir), deterministic:
        if accelerator.is_main_process:
            clear_marker(output_dir)
            clean_up(output_dir)
            if shards is not None:
                report_shards(shards.shards)
        # After the cleaning, which may put a checkpoint back.
        checkpoint = find_checkpoint(args.resume_from_checkpoint, output_dir)
        if checkpoint is not None:
            check_flags(checkpoint, flags_of_run(args), resolution_is_given=resolution_is_given)
        if shards is not None:
            bad_pictures.add_lost(shards)
        start_trackers(accelerator, args)
        trainer = VisualizerTrainer(args, source, bad_pictures, accelerator, preemption, on_log)
        if checkpoint is not None:
            load_checkpoint(checkpoint, trainer.state)
        elif args.alignment_conditions is not None:
            trainer.align(args.alignment_conditions)
        return trainer.train()


def open_source(args: VisualizerArguments, images: Sequence[Image.Image] | None = None) -> ImageSource:
    """The pictures that the flags name.

    Raises:
        ValueError: if there are none.
    """
    if images is not None:
        if not images:
            raise ValueError("images is empty; give at least one picture")
        return ImageList(images)
    return open_pictures(args.image_jsons, args.image_folder)
