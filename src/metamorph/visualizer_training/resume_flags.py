"""Flags of the visualizer that differ from those that a checkpoint was trained with: they act, or are refused."""

from __future__ import annotations

import json
import logging
from dataclasses import fields
from pathlib import Path
from typing import Any

from metamorph.runs.checkpoint_files import CheckpointError
from metamorph.runs.flag_changes import MODELS, changed_flags, describe_model
from metamorph.visualization.token_options import TokenOptions
from metamorph.visualizer_training.arguments import VisualizerArguments
from metamorph.visualizer_training.checkpoints import STATE_FILE


logger = logging.getLogger(__name__)

ACTING = (
    "lr",
    "unet_lr",
    "weight_decay",
    "max_grad_norm",
    "ema_decay",
    "mixed_precision",
    "training_steps",
    "batch_size",
    "gradient_accumulation_steps",
)
"""Flags that act from the next step on; the log names those that have changed."""
FIXED = (
    *(field.name for field in fields(TokenOptions)),
    "pretrained_model_name_or_path",
    "revision",
    "variant",
    "num_heads",
    "resolution",
    "random_crop",
    "lr_scheduler",
    "lr_warmup_steps",
    "cfg_prob",
    "timestep_power",
    "noise_offset",
    "snr_gamma",
)
"""Flags that decide what is learnt, and that do not show in the sizes of the weights."""


def flags_of_run(args: VisualizerArguments) -> dict[str, Any]:
    """The flags that are compared, as they are written into a checkpoint.

    Args:
        args: Result of `adopt_resolution` and `adopt_token_options`.
    """
    flags = {name: getattr(args, name) for name in (*ACTING, *FIXED)}
    return flags | {name: describe_model(flags[name]) for name in MODELS if name in flags}


def check_flags(checkpoint: Path, flags: dict[str, Any], *, resolution_is_given: bool) -> None:
    """Compare the flags of a run with those of the checkpoint that it resumes; before the weights are loaded.

    Args:
        checkpoint: Result of `find_checkpoint`.
        flags: Result of `flags_of_run`.
        resolution_is_given: Whether `--resolution` is, rather than taken from the diffusion model.

    Raises:
        CheckpointError: naming each flag that must not differ, with both values.
    """
    old = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8")).get("flags", {})
    if "resolution" not in old and not resolution_is_given:
        raise CheckpointError(
            f"--resume_from_checkpoint {checkpoint} was written by an earlier version, which does not tell its "
            "--resolution: give the one that it was trained at (--resolution 512, the default of that version)"
        )
    if unknown := [f"--{name}" for name in FIXED if name not in old]:
        logger.warning("%s does not tell the value of %s that it was trained with", checkpoint, ", ".join(unknown))
    changed = changed_flags(old, flags)
    if fixed := [text for name, text in changed.items() if name in FIXED]:
        raise CheckpointError(
            f"--resume_from_checkpoint {checkpoint} was trained with other flags: {'; '.join(fixed)}. Restore them, "
            "or start anew in another --output_dir (--resume_from_checkpoint False starts anew here)"
        )
    if changed:
        logger.warning("flags that differ from those of %s: %s", checkpoint, "; ".join(changed.values()))
