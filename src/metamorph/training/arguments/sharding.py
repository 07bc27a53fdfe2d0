"""The flag `--sharding`: the engine that divides the training state among processes, and its configuration."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from accelerate import ParallelismConfig
from transformers import TrainingArguments
from transformers.integrations import is_deepspeed_available

from metamorph.flags.extras import install_command


logger = logging.getLogger(__name__)

FSDP2_CONFIG = {"version": 2, "state_dict_type": "SHARDED_STATE_DICT", "reshard_after_forward": True}
"""`fsdp_config` of `--sharding fsdp2`."""

SHARDINGS = ("auto", "ddp", "fsdp2", "zero2", "zero3", "zero2_offload", "zero3_offload")
"""Values of `--sharding`."""


def deepspeed_config(sharding: str) -> dict[str, Any]:
    """The DeepSpeed configuration of a ZeRO engine; `scripts/<sharding>.json` is the same.

    Transformers fills in "auto" from the training flags; gradient clipping from `--max_grad_norm`, 1.0 by default.
    """
    offload = {"device": "cpu", "pin_memory": True}
    zero: dict[str, Any] = {
        "stage": 3 if sharding.startswith("zero3") else 2,
        "contiguous_gradients": True,
        "overlap_comm": True,
        "reduce_bucket_size": 200_000_000,
    }
    if zero["stage"] == 2:
        zero["allgather_bucket_size"] = 200_000_000
    else:
        zero |= {
            "stage3_prefetch_bucket_size": 50_000_000,
            "stage3_param_persistence_threshold": 100_000,
            "stage3_max_live_parameters": 1_000_000_000,
            "stage3_max_reuse_distance": 1_000_000_000,
            # The trainer gathers the float32 master weights itself when it saves.
            "stage3_gather_16bit_weights_on_model_save": False,
        }
    if sharding.endswith("_offload"):
        zero["offload_optimizer"] = offload
        if zero["stage"] == 3:
            zero["offload_param"] = offload
    return {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        # Otherwise micro-batches would be added up in the precision of the computation.
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": zero,
    }


def check_deepspeed(config: dict[str, Any]) -> None:
    """Refuse an optimizer or a scheduler in a DeepSpeed configuration, which would replace those of the flags."""
    replaced = {"optimizer": "--optim, --learning_rate, --weight_decay", "scheduler": "--lr_scheduler_type"}
    for section, flags in replaced.items():
        if section in config:
            raise ValueError(
                f"--deepspeed: the section {section!r} is not supported: it would replace {flags} and set one learning "
                "rate for all modules, even when a run resumes with another one. Remove it and use the flags"
            )


def check_engine_flags(args: TrainingArguments, sharding: str) -> None:
    """Refuse flags of Transformers that name an engine besides `sharding`, or configure one that is not used."""
    if args.fsdp_config and not args.fsdp:
        raise ValueError("--fsdp_config has no effect without --fsdp True, which takes the place of --sharding fsdp2")
    for flag in ("fsdp", "deepspeed"):
        if sharding != "auto" and getattr(args, flag):
            raise ValueError(f"--sharding {sharding} and --{flag} {getattr(args, flag)} both name an engine: drop one")


def apply_sharding(args: TrainingArguments, sharding: str) -> None:
    """Translate `sharding` to flags of Transformers, before `TrainingArguments.__post_init__` reads them.

    `auto` is decided later, when the model is known.

    Raises:
        ModuleNotFoundError: if DeepSpeed is asked for and not installed.
        ValueError: for an engine that needs GPUs where there are none.
    """
    # Configured by `accelerate launch`.
    launched = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" and os.environ.get("FSDP_VERSION") == "2"
    if sharding == "auto" and not args.fsdp and launched:
        sharding = "fsdp2"
    if sharding == "auto":
        return
    if sharding == "fsdp2":
        check_has_gpus(args)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            use_fsdp2(args)
        else:
            logger.warning("--sharding fsdp2 has nothing to divide in a single process")
    elif sharding.startswith("zero"):
        if not is_deepspeed_available():
            raise ModuleNotFoundError(f"--sharding {sharding} needs DeepSpeed: {install_command('deepspeed')}")
        args.deepspeed = deepspeed_config(sharding)


def check_has_gpus(args: TrainingArguments) -> None:
    """Refuse FSDP2 on a CPU."""
    if args.use_cpu or not torch.accelerator.is_available():
        raise ValueError(
            "--sharding fsdp2 needs GPUs: on a CPU Accelerate would silently train without sharding; use --sharding ddp"
        )


def use_fsdp2(args: TrainingArguments) -> None:
    """Set the flags of Transformers for FSDP2, with checkpoints that any number of processes can read."""
    if args.save_only_model:
        raise ValueError("--save_only_model True does not work with FSDP2, whose checkpoints hold shards: leave it out")
    args.fsdp = True
    args.fsdp_config = dict(FSDP2_CONFIG)


def replicate_shards(args: TrainingArguments, sharding: str, dp_replicate: int) -> None:
    """Let FSDP2 divide the state within each of `dp_replicate` groups of consecutive ranks, not among all processes.

    Every process still reads its own batches. Raises as `shard_group` does.
    """
    shards = shard_group("fsdp2" if args.fsdp else sharding, args.world_size, dp_replicate)
    if dp_replicate > 1:
        args.parallelism_config = ParallelismConfig(dp_replicate_size=dp_replicate, dp_shard_size=shards)


def shard_group(engine: str, processes: int, dp_replicate: int) -> int:
    """Number of processes in each of the `dp_replicate` groups that hold all weights.

    Raises:
        ValueError: for another engine than FSDP2, or groups of different sizes or of a single process.
    """
    shards, rest = divmod(processes, dp_replicate)
    if dp_replicate > 1 and engine != "fsdp2":
        raise ValueError(f"--dp_replicate {dp_replicate} has no effect without FSDP2: add --sharding fsdp2")
    if dp_replicate > 1 and (rest or shards < 2):
        raise ValueError(
            f"--dp_replicate {dp_replicate} does not divide {processes} processes into groups of equal size with two "
            "or more each: give the number of machines, or another divisor of the number of processes"
        )
    return shards
