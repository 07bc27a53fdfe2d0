"""Flags that both trainers share: those of Transformers, with other defaults, and their checks."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments
from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from metamorph.flags.checks import RemembersGiven, check_output_folder
from metamorph.flags.extras import install_command
from metamorph.training.arguments.sharding import SHARDINGS, apply_sharding, check_deepspeed, check_engine_flags


logger = logging.getLogger(__name__)

OTHER_OPTIMIZERS = ("galore", "apollo", "lomo", "adalomo", "schedule_free")
"""Name prefixes of optimizers that do not work with our parameter groups, steps or checkpoints."""
INSTALL_HINTS = {
    "tensorboard": install_command("trackers"),
    "wandb": install_command("trackers"),
    "trackio": "pip install trackio",
}


@dataclass
class RunTrainingArguments(RemembersGiven, TrainingArguments):
    """`transformers.TrainingArguments` for a [`RunTrainer`]; wrong values are found before anything is loaded.

    Without a GPU the run falls back to the CPU.
    """

    output_dir: str | None = None
    """Folder for checkpoints and the trained model. Required."""
    sharding: str = field(default="auto", metadata={"choices": SHARDINGS})
    """How the training state is divided among GPUs: ddp (not at all), fsdp2, zero2, zero3 (DeepSpeed), zero2_offload,
    zero3_offload (into main memory), or auto: fsdp2 if it does not fit on one GPU, else ddp."""
    logging_steps: float = 10
    """Log every this many optimizer steps."""
    logging_nan_inf_filter: bool = False
    """Leave NaN and infinite losses out of the log. Off by default: the filter reads the loss back from the device at
    every step and hides what should be seen."""
    remove_unused_columns: bool = False
    """Drop columns that the model does not take. Off: the dataset returns exactly what the collator needs."""
    prediction_loss_only: bool = True
    """Evaluation returns losses only."""
    disable_tqdm: bool | None = None
    """Log lines instead of a progress bar; by default when there is no terminal."""
    ddp_find_unused_parameters: bool | None = False
    """Search for weights without a gradient at every step. Off by default: every batch reaches every trained weight."""
    save_total_limit: int | None = 2
    """Number of checkpoints to keep: the newest, and the best with `load_best_model_at_end`. 0 keeps all."""
    resume_from_checkpoint: str | None = None
    """A checkpoint folder. By default (or `latest`) the newest complete one in `output_dir`, if any; True requires
    one; False starts from the beginning."""

    def __post_init__(self) -> None:
        if self.output_dir is None:
            raise ValueError("--output_dir is required: the folder for checkpoints and the trained model")
        check_output_folder(self.output_dir, "--output_dir")
        self._check_shared_ranges()
        trackers = [self.report_to] if isinstance(self.report_to, str) else self.report_to or []
        if set(trackers) - {"none"}:
            check_trackers(trackers)
        if self.optim.startswith(OTHER_OPTIMIZERS):
            raise ValueError(
                f"--optim {self.optim} is not supported: it groups the weights itself, updates them in the backward "
                "pass, or swaps them for evaluation; use adamw_torch_fused, adafactor, adamw_8bit, …"
            )
        if not torch.accelerator.is_available():
            self.use_cpu = True
        check_engine_flags(self, self.sharding)
        if self.dataloader_num_workers == 0:
            for name in (
                "dataloader_persistent_workers",
                "dataloader_prefetch_factor",
                "dataloader_multiprocessing_context",
            ):
                if value := getattr(self, name, None):
                    raise ValueError(f"--{name} {value} has no effect without --dataloader_num_workers: give both")
        self._check_device()
        apply_sharding(self, self.sharding)
        if self.disable_tqdm is None:
            self.disable_tqdm = not sys.stderr.isatty()
        super().__post_init__()
        self._check_accelerator()
        if self.n_gpu > 1:
            logger.warning("using 1 of %d GPUs: start with torchrun to use them all", self.n_gpu)
            self._n_gpu = 1  # nn.DataParallel would split pixel_values as if every sample had one image

    def check_at_least(self, least: float, names: str, *, above: bool = False) -> None:
        """Refuse values below `least` (or equal, with `above`) or not finite of the flags in `names`, "NAME NAME …"."""
        for name in names.split():
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and (value > least or (value == least and not above))):
                raise ValueError(f"--{name} {value} must be {f'larger than {least}' if above else f'{least} or more'}")

    def _check_shared_ranges(self) -> None:
        self.check_at_least(1, "gradient_accumulation_steps per_device_train_batch_size per_device_eval_batch_size")
        at_least_0 = "dataloader_num_workers adam_epsilon weight_decay max_grad_norm save_total_limit seed data_seed"
        self.check_at_least(0, at_least_0)
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must lie in [0, 1)")
        if self.save_strategy == "steps" and not self.save_steps > 0:
            raise ValueError(f"--save_steps {self.save_steps} must be larger than 0, or --save_strategy no")

    def _check_device(self) -> None:
        if self.fp16 and self.use_cpu:
            raise ValueError("--fp16 True needs a GPU: a CPU would compute in float32; use --bf16 True, or neither")

    def _check_accelerator(self) -> None:
        if self.deepspeed_plugin is not None:
            check_deepspeed(self.deepspeed_plugin.deepspeed_config)
        config = self.accelerator_config
        for name, accepted in (
            ("split_batches", False),
            ("dispatch_batches", None),
            ("even_batches", True),
            ("use_seedable_sampler", True),
        ):
            value = getattr(config, name)
            if value != accepted and not (name == "dispatch_batches" and value is False):
                raise ValueError(
                    f"--accelerator_config: {name} {value} is not supported, since every process reads the batches "
                    "that are planned for it: leave it out"
                )


def check_trackers(names: Iterable[str]) -> None:
    """Refuse a tracker in `--report_to` that is unknown or not installed."""
    names = [name for name in names if name not in ("none", "all")]
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            usual = ", ".join(["none", *INSTALL_HINTS])
            raise ValueError(
                f"--report_to {name} is unknown: use one of {usual} (or another of Transformers' integrations: "
                f"{', '.join(sorted(set(INTEGRATION_TO_CALLBACK) - set(INSTALL_HINTS)))})"
            )
    available = get_available_reporting_integrations() if names else []
    for name in names:
        if name not in available:
            hint = INSTALL_HINTS.get(name, f"install what Transformers' documentation names for {name}")
            raise ValueError(f"--report_to {name}: {name} is not installed; {hint}, or report to none")
