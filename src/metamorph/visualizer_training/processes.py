"""The processes of a run of the trainer: how they start together, and how they stop when a signal asks them to."""

from __future__ import annotations

import importlib.util
import logging
import os
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import GradientAccumulationPlugin

from metamorph.flags.extras import install_command
from metamorph.visualizer_training.arguments import VisualizerArguments


logger = logging.getLogger(__name__)

_ENGINES = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM")
"""Variables by which `accelerate launch` asks for an engine that the loop does not know."""


def start_accelerate(args: VisualizerArguments) -> Accelerator:
    """Devices, processes and precision of this run; writes nothing.

    Raises:
        ValueError: if the tracker is not installed, or `accelerate launch` asks for an engine of its own.
    """
    for variable in _ENGINES:
        if os.environ.get(variable, "false").lower() == "true":
            raise ValueError(
                f"accelerate launch has set {variable}: start the visualizer with torchrun, or with a configuration "
                "without it; --sharding fsdp2 divides the model"
            )
    tracker = None if args.report_to == "none" else args.report_to
    if tracker is not None and importlib.util.find_spec(tracker) is None:
        raise ValueError(f"--report_to {tracker}: {tracker} is not installed: {install_command('trackers')}")
    if is_initialized() and AcceleratorState().mixed_precision != args.mixed_precision:
        # Left by another trainer of this process. Accelerate refuses to change it, and has no public way to start anew
        # that keeps the process group; Transformers' Trainer does the same.
        AcceleratorState._reset_state()
    return Accelerator(
        # Unless told, Accelerate takes several processes without a GPU for several unrelated single ones.
        cpu=not torch.accelerator.is_available(),
        mixed_precision=args.mixed_precision,
        # The loop divides by the number of batches itself; unless told, Accelerate takes another one from the launcher.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        log_with=tracker,
        project_dir=str(_tensorboard_folder(args).parent),
    )


def start_trackers(accelerator: Accelerator, args: VisualizerArguments) -> None:
    """Start the tracker of `report_to`, which may write to the output folder: once the run holds its lock."""
    if args.report_to == "none":
        return
    plain = {name: value for name, value in args.to_dict().items() if isinstance(value, (int, float, str))}
    # Accelerate joins folder and name of the project.
    project = _tensorboard_folder(args).name if args.report_to == "tensorboard" else "metamorph-visualizer"
    accelerator.init_trackers(project, config=plain)


def _tensorboard_folder(args: VisualizerArguments) -> Path:
    """Where `metamorph train` has it."""
    return Path(os.environ.get("TENSORBOARD_LOGGING_DIR", Path(args.output_dir, "tensorboard"))).expanduser()
