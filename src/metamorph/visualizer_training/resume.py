"""How a run of the visualizer resumes: check the checkpoint's kind, data and flags, and find its place in the data.

The rest is shared by all runs: `runs/find_checkpoint.py` and `training/base_trainer.py`.
"""

from dataclasses import fields
from pathlib import Path
from typing import Any

from metamorph.runs.checkpoint_files import CheckpointError, read_manifest
from metamorph.runs.find_checkpoint import ResumePoint, find_checkpoint
from metamorph.runs.flag_changes import MODELS, compare_flags, describe_model
from metamorph.visualization.folders import ARGUMENTS_FILE
from metamorph.visualization.token_options import TokenOptions
from metamorph.visualizer_training.arguments import VisualizerArguments
from metamorph.visualizer_training.average import AVERAGE_FILE


WEIGHTS_FILE = "trained_weights.safetensors"
ACTING = (
    *("lr", "unet_lr", "weight_decay", "max_grad_norm", "ema_decay", "mixed_precision", "training_steps"),
    *("batch_size", "gradient_accumulation_steps", "adam_beta1", "adam_beta2", "adam_epsilon"),
)
"""Flags that may change at a resume; the log names those that have."""
FIXED = (
    *(field.name for field in fields(TokenOptions)),
    *("pretrained_model_name_or_path", "revision", "variant", "num_heads", "resolution", "random_crop"),
    *("lr_scheduler", "lr_warmup_steps", "cfg_prob", "timestep_power", "noise_offset", "snr_gamma", "optim"),
    "optim_args",
)
"""Flags that decide what is learned, and that the sizes of the weights do not show."""
_DATA = {"num_images": "--image_folder, --image_jsons", "digest": "--image_folder, --image_jsons", "seed": "--seed"}
"""What describes the data, and the flags that decide it."""


def flags_of_run(args: VisualizerArguments) -> dict[str, Any]:
    """The flags that a checkpoint records, from the result of `adopt_resolution` and `adopt_token_options`."""
    known = args.to_dict()
    flags = {name: known[name] for name in (*ACTING, *FIXED)}
    return flags | {name: describe_model(flags[name]) for name in MODELS if name in flags}


def find_resume_point(
    args: VisualizerArguments, flags: dict[str, Any], data: dict[str, Any]
) -> tuple[str, ResumePoint] | tuple[None, None]:
    """Find the checkpoint that a run resumes, and its place in the data, before any weights are loaded.

    Steps keep their number, whatever the size of a batch; the next sample is the one after those of the checkpoint.
    `data` is what decides the order of images: `num_images`, `digest` and `seed`. A checkpoint of another kind
    of run, or of other data or flags, is a `CheckpointError`.
    """
    folder = find_checkpoint(str(args.output_dir), args.resume_from_checkpoint, _check_kind, ARGUMENTS_FILE)
    if folder is None:
        return None, None
    manifest = read_manifest(folder)
    assert manifest is not None  # find_checkpoint returns undamaged ones only
    compare_flags(folder, manifest["flags"], flags, FIXED)
    recorded = manifest["data"]
    recorded.setdefault("num_images", recorded.get("pictures"))  # its name in earlier versions
    for name, given in _DATA.items():
        if recorded.get(name) != data[name]:
            raise CheckpointError(
                f"{folder} was trained on other data ({name} {recorded.get(name)}, now {data[name]}): give it the "
                f"{given} that it had. To train on other data, start a new run in another --output_dir with the "
                "projector and the UNet of a finished one"
            )
    if (Path(folder) / AVERAGE_FILE).is_file() != bool(args.ema_decay):
        raise CheckpointError(f"--resume_from_checkpoint {folder}: switch --ema_decay on or off as it was there")
    return folder, ResumePoint(manifest["step"], 0, manifest["samples"], rescales_steps=False)


def _check_kind(folder: str) -> None:
    if (Path(folder) / "state.json").is_file():
        raise CheckpointError(
            f"{folder} was written by an earlier version of MetaMorph, whose checkpoints of the visualizer cannot be "
            "resumed: finish that run with that version, or start over with --resume_from_checkpoint False"
        )
    if not (Path(folder) / WEIGHTS_FILE).is_file():
        raise CheckpointError(f"{folder} is a checkpoint, but not one of the visualizer: it has no {WEIGHTS_FILE}")
