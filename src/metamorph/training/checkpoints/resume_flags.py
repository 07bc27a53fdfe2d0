"""Flags of a resumed run that differ from those of its checkpoint: logged, confirmed by the user, or refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from metamorph.runs.checkpoint_files import read_manifest
from metamorph.runs.flag_changes import compare_flags, describe_model
from metamorph.training.arguments import RunArguments
from metamorph.training.arguments.training import CHANGEABLE
from metamorph.training.build import LOSS_FIELDS, STRUCTURE_FIELDS, ModelSpec
from metamorph.training.checkpoints.weights import ARGUMENTS_FILE


logger = logging.getLogger(__name__)

ACTING = (
    "learning_rate",
    "mm_projector_lr",
    "vision_lr",
    "vision_head_lr",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "max_steps",
    "num_train_epochs",
    "bf16",
    "fp16",
    "model_max_length",
)
"""Flags that take effect from the next step on; changes are logged."""
FIXED = (
    "optim",
    "optim_args",
    "freeze_vision",
    "freeze_backbone",
    "freeze_mm_mlp_adapter",
    "use_vision_ar",
    "lora_r",
    "lora_alpha",
    "lora_target_modules",
    "bits",
    "quant_type",
    "double_quant",
    *STRUCTURE_FIELDS,
)
"""Flags that must not change, since the weights or the optimizer state would not fit."""

_RATES = ("learning_rate", "mm_projector_lr", "vision_lr", "vision_head_lr")
_STATEFUL_SCHEDULES = ("reduce_lr_on_plateau", "greedy")
"""They lower the rate step by step, and do not keep the initial one."""


def flags_of_run(args: RunArguments, spec: ModelSpec) -> dict[str, Any]:
    """The flags that are compared, as a checkpoint records them: JSON values. `learning_rate` must be a number."""
    known = args.training.to_sanitized_dict()
    flags = {name: known[name] for name in (*ACTING, *CHANGEABLE, *FIXED) if name in known}
    flags |= {name: getattr(spec.config, name) for name in (*STRUCTURE_FIELDS, *LOSS_FIELDS)}
    names = ["freeze_vision", "freeze_backbone", "freeze_mm_mlp_adapter", "bits"]
    names += ["quant_type", "double_quant"] if args.model.bits == 4 else []
    names += ["lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"] if args.model.lora_enable else []
    flags |= {name: getattr(args.model, name) for name in names}
    flags["image_aspect_ratio"] = spec.processor.image_aspect_ratio
    flags["model_max_length"] = args.data.model_max_length  # with packing, also part of the description of the data
    flags["model_name_or_path"] = describe_model(args.model.model_name_or_path)
    if not spec.is_metamorph:
        flags["vision_tower"] = describe_model(args.model.vision_tower)
    return flags


def check_flags(checkpoint: str | None, flags: dict[str, Any], allowed: list[str] | None) -> None:
    """Compare the flags of a run with those of its checkpoint; `allowed` are the values of `allow_changes`."""
    if checkpoint is None:
        return
    old = _flags_of(Path(checkpoint), flags)
    fixed = set(FIXED)
    if {known.get("lr_scheduler_type") for known in (old, flags)} & set(_STATEFUL_SCHEDULES):
        fixed |= {*_RATES, "lr_scheduler_type", "lr_scheduler_kwargs"}
    changed = compare_flags(checkpoint, old, flags, fixed, CHANGEABLE, allowed or ())
    if {"max_steps", "num_train_epochs"} & changed:
        logger.warning("the learning rate schedule now ends with this run: %s", flags["lr_scheduler_type"])


def _flags_of(checkpoint: Path, flags: dict[str, Any]) -> dict[str, Any]:
    """The flags that the checkpoint was trained with, as far as it records them."""
    manifest = read_manifest(checkpoint)
    if manifest is not None and isinstance(manifest.get("flags"), dict):
        return manifest["flags"]
    # Written by an earlier version.
    training, model = (_read(checkpoint / name) for name in (ARGUMENTS_FILE, "config.json"))
    old = {name: training[name] for name in (*ACTING, *CHANGEABLE, *FIXED) if name in training}
    old |= {name: model[name] for name in (*STRUCTURE_FIELDS, *LOSS_FIELDS) if name in model}
    unknown = [f"--{name}" for name in flags if name not in old]
    logger.info("%s does not record its value of %s", checkpoint, ", ".join(unknown))
    return old


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
