"""The flags of `metamorph train`: the names and defaults of the training guide, checked before anything is loaded."""

import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers import SchedulerType, get_scheduler

from metamorph.data.batching.packing import check_grouping
from metamorph.flags.checks import check_choice, check_model_reference
from metamorph.mini import shipped_folder
from metamorph.models.text_head import check_text_loss
from metamorph.training.arguments.data import DataArguments
from metamorph.training.arguments.model import ModelArguments
from metamorph.training.arguments.shared import RunTrainingArguments
from metamorph.training.arguments.unsupported import UNSUPPORTED


__all__ = ["DataArguments", "MetaMorphTrainingArguments", "ModelArguments"]

LOSS_NORMALIZATIONS = ("global", "micro_batch")
RECOMPUTE = ("none", "full", "selective")
AUTO_LEARNING_RATE = "auto"
SAMPLING_STRATEGIES = ("random", "sequential", "group_by_length")
CHANGEABLE = (
    "image_aspect_ratio",
    "lora_dropout",
    "loss_normalization",
    "lr_scheduler_kwargs",
    "lr_scheduler_type",
    "model_name_or_path",
    "neftune_noise_alpha",
    "vision_coef",
    "vision_tower",
    "warmup_steps",
)
"""What `allow_changes` may name: flags that change what a run minimises, or how."""
NO_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")
"""Schedules of Transformers that ignore `warmup_steps`."""


@dataclass
class MetaMorphTrainingArguments(RunTrainingArguments):
    """How it learns: every flag of `transformers.TrainingArguments`, with the guide's defaults, and our own.

    Weights are kept in float32; `bf16` and `fp16` choose the precision of the computation (autocast). Without a
    GPU the run falls back to the CPU.
    """

    learning_rate: float | str = 5e-5
    """Peak learning rate; the default is Transformers', and a stage that runs with it is warned about. `auto` takes
    `base_learning_rate` × √(samples in a step / `base_batch_size`), the rule of the training guide."""
    base_learning_rate: float | None = None
    """For `learning_rate="auto"`: a learning rate that is known to be good for `base_batch_size`."""
    base_batch_size: int | None = None
    """For `learning_rate="auto"`: samples in an optimizer step that `base_learning_rate` was found with."""
    weight_decay: float = 0.0
    """Weight decay of AdamW; norms and biases have none."""
    lr_scheduler_type: str = "cosine"
    """Shape of the learning rate over the run."""
    warmup_ratio: float = 0.03
    """Share of the optimizer steps used for warm-up, in [0, 1). Ignored when `warmup_steps` is given."""
    warmup_steps: float = 0
    """Optimizer steps of warm-up (below 1: their share); 0 leaves it to `warmup_ratio`."""
    evaluation_strategy: str | None = None
    """Spelling of `eval_strategy` in Transformers 4, still understood."""
    bf16: bool = True
    """Compute in bfloat16, with float32 weights."""
    fp16: bool = False
    """Compute in float16, with float32 weights; needs `bf16=False`."""
    loss_normalization: str = "global"
    """`global` divides each loss by its tokens over all micro-batches and ranks of the optimizer step;
    `micro_batch` averages every micro-batch by itself, as the original system did."""
    packing: bool = True
    """Whether several samples share a row of `model_max_length` tokens, without seeing each other. Batches are then
    counted in rows: see `per_device_train_batch_size`. False pads every sample to the longest of its batch."""
    per_device_train_batch_size: int = 8
    """Rows per process and micro-batch. With `packing` a row holds as many samples as fit into `model_max_length`
    tokens, without it one sample."""
    train_sampling_strategy: str = "random"
    """Order of the samples: random, sequential, or (only with `packing=False`) group_by_length, which puts samples of
    similar length into one step."""
    group_by_length: bool = False
    """Spelling of `train_sampling_strategy="group_by_length"` in Transformers 4, still understood."""
    mm_projector_lr: float | None = None
    """Learning rate of the connector and of the new tokens' rows in stage 1; by default `learning_rate`."""
    vision_lr: float | None = None
    """Learning rate of the vision tower (with `freeze_vision=False`); by default `learning_rate`."""
    vision_head_lr: float | None = None
    """Learning rate of the vision head; by default `learning_rate`."""
    label_names: list[str] | None = None
    """Inputs that are labels; by default `labels`."""
    hub_strategy: str = "end"
    """When `push_to_hub` uploads: end, when the result is whole; every_save, checkpoint and all_checkpoints as in
    Transformers, which then uploads the parts of a checkpoint that it knows."""
    text_loss: str = "auto"
    """How the text loss is computed, with the same result: `full` makes the logits of all supervised tokens; `chunked`
    some at a time, and again for the backward pass; `fused` by PyTorch 2.13's operator, in float32 only; `liger` by
    liger-kernel, on a GPU. `auto` takes the one that fits, and `full` where the logits are few."""
    recompute: str = "none"
    """What is computed again for the backward pass instead of kept: `none`; `full`, all but the input of each layer;
    or `selective`, what lies between matrix products and attention. Saves memory, costs time."""
    allow_changes: list[str] | None = None
    """Flags that may have other values than in the checkpoint that the run resumes, such as `vision_coef
    lr_scheduler_type`; without it such a change is an error."""

    sample_steps: int | None = None
    """Every so many optimizer steps the prompts of `sample_prompts` are answered, into `output_dir`/samples and to the
    tracker; by default never."""
    sample_prompts: str | None = None
    """Prompts for `sample_steps`: a text file with one a line, or JSON Lines of `{"prompt": "…", "images": ["…"],
    "draw": true}`."""
    sample_visualizer: str | None = None
    """Folder of a visualizer that draws the pictures of these answers; without it their visual tokens are kept."""
    peak_tflops: float | None = None
    """Peak of one device in 10¹² FLOP/s, for `mfu` in the log; by default that of the GPU's data sheet."""

    def __post_init__(self) -> None:
        self.refuse_unsupported(UNSUPPORTED)
        self._check_observation()
        for name in self.allow_changes or ():
            check_choice("--allow_changes", name, CHANGEABLE)
        check_choice("--loss_normalization", self.loss_normalization, LOSS_NORMALIZATIONS)
        check_choice("--recompute", self.recompute, RECOMPUTE)
        check_choice("--lr_scheduler_type", self.lr_scheduler_type, tuple(kind.value for kind in SchedulerType))
        check_text_loss(self.text_loss, half_precision=self.bf16 or self.fp16)
        self._check_batches()
        if self.bf16 and self.fp16:
            raise ValueError("--fp16 True and --bf16 True exclude each other: add --bf16 False")
        self._check_learning_rates()
        self._check_ranges()
        self._check_warmup()
        if self.evaluation_strategy is not None:
            self.eval_strategy = self.evaluation_strategy
        self._check_combinations()
        if self.label_names is None:
            self.label_names = ["labels"]
        super().__post_init__()
        self._check_schedule()

    def _check_observation(self) -> None:
        if (self.sample_steps is None) != (self.sample_prompts is None):
            raise ValueError(
                f"--sample_steps {self.sample_steps} and --sample_prompts {self.sample_prompts} go together: give both"
            )
        if self.sample_steps is not None and self.sample_steps < 1:
            raise ValueError(f"--sample_steps {self.sample_steps} must be at least 1")
        if self.sample_visualizer is not None:
            if self.sample_steps is None:
                raise ValueError(f"--sample_visualizer {self.sample_visualizer} needs --sample_steps")
            self.sample_visualizer = shipped_folder(self.sample_visualizer, "visualizer")
            check_model_reference(self.sample_visualizer, flag="--sample_visualizer", file="model_index.json")
        if self.peak_tflops is not None and not (math.isfinite(self.peak_tflops) and self.peak_tflops > 0):
            raise ValueError(f"--peak_tflops {self.peak_tflops} must be a number above 0")

    def _check_learning_rates(self) -> None:
        auto = self.learning_rate == AUTO_LEARNING_RATE
        for name in ("learning_rate", "mm_projector_lr", "vision_lr", "vision_head_lr"):
            value = getattr(self, name)
            if value is None or (auto and name == "learning_rate"):
                continue
            if isinstance(value, str) or not (math.isfinite(value) and value >= 0):
                word = f", or {AUTO_LEARNING_RATE}" if name == "learning_rate" else ""
                raise ValueError(f"--{name} {value} must be a finite number, 0 or larger{word}")
        for name in ("base_learning_rate", "base_batch_size"):
            value = getattr(self, name)
            if value is None and auto:
                raise ValueError(
                    f"--learning_rate {AUTO_LEARNING_RATE} needs --{name}: give a learning rate that is known to be "
                    "good and the number of samples in a step it was found with (the training guide's, for stage 2: "
                    "--base_learning_rate 6.93e-5 --base_batch_size 1536)"
                )
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"--{name} {value} must be a finite number larger than 0")

    def _check_batches(self) -> None:
        if self.group_by_length:
            self.train_sampling_strategy = "group_by_length"
        check_choice("--train_sampling_strategy", self.train_sampling_strategy, SAMPLING_STRATEGIES)
        check_grouping(self.packing, self.train_sampling_strategy == "group_by_length")

    def _check_ranges(self) -> None:
        if self.max_steps != -1 and self.max_steps < 1:
            raise ValueError(
                f"--max_steps {self.max_steps} must be at least 1, or -1 for --num_train_epochs; --dry-run shows what "
                "a run would do"
            )
        if self.max_steps == -1 and not self.num_train_epochs > 0:
            raise ValueError(f"--num_train_epochs {self.num_train_epochs} must be larger than 0")
        if self.neftune_noise_alpha is not None and not self.neftune_noise_alpha > 0:
            raise ValueError(f"--neftune_noise_alpha {self.neftune_noise_alpha} must be larger than 0")

    def _check_warmup(self) -> None:
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"--warmup_ratio {self.warmup_ratio} must lie in [0, 1)")
        if self.warmup_steps and self.lr_scheduler_type in NO_WARMUP:
            raise ValueError(
                f"--warmup_steps {self.warmup_steps} has no effect with --lr_scheduler_type {self.lr_scheduler_type}, "
                "which has no warm-up: use constant_with_warmup, or leave --warmup_steps out"
            )
        if not self.warmup_steps:
            self.warmup_steps = self.warmup_ratio  # Transformers 5 reads a value below 1 as a ratio

    def _check_combinations(self) -> None:
        """Refuse flags that do nothing without another one."""
        if self.do_eval and self.eval_strategy == "no" and not self.eval_on_start:
            raise ValueError("--do_eval True has no effect with --eval_strategy no: say when by --eval_strategy")
        if self.metric_for_best_model is not None and self.eval_strategy == "no":
            raise ValueError(
                f"--metric_for_best_model {self.metric_for_best_model} is never measured with --eval_strategy no: add "
                "--eval_strategy steps or epoch, and --eval_data_path"
            )

    def _check_schedule(self) -> None:
        """Build the schedule once, for nothing: wrong `lr_scheduler_kwargs` are found before the weights are loaded."""
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        try:
            get_scheduler(
                self.lr_scheduler_type,
                optimizer,
                num_warmup_steps=0,
                num_training_steps=1000,
                scheduler_specific_kwargs=self.lr_scheduler_kwargs,
            )
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"--lr_scheduler_type {SchedulerType(self.lr_scheduler_type).value} and --lr_scheduler_kwargs "
                f"{self.lr_scheduler_kwargs} do not go together: {error}"
            ) from error
