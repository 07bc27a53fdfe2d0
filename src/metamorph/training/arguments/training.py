"""The flags of `metamorph train` that set how the model is trained, with the defaults of the training guide."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import InitVar, dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import SchedulerType, get_scheduler

from metamorph.data.batching.packing import check_grouping
from metamorph.flags.checks import check_choice, check_model_reference
from metamorph.mini import shipped_folder
from metamorph.models.text_head import TEXT_LOSSES, check_text_loss
from metamorph.training.arguments.sharding import check_engine_flags, replicate_shards
from metamorph.training.arguments.shared import RunTrainingArguments
from metamorph.training.arguments.unsupported import UNSUPPORTED


LOSS_NORMALIZATIONS = ("global", "micro_batch")
RECOMPUTE = ("none", "full", "selective")
AUTO_LEARNING_RATE = "auto"
SCHEDULES = tuple(kind.value for kind in SchedulerType)
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
"""Values of `allow_changes`: flags that change the objective of a run, or how it is minimised."""
NO_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")
"""Schedules of Transformers that ignore `warmup_steps`."""
ENGINE_FLAGS = {"sharding": "ddp", "dp_replicate": 1, "fsdp": None, "fsdp_config": None, "deepspeed": None}
"""Flags that set up an engine -> the value that does not."""
NOT_GIVEN = "(not given)"
"""`output_dir` of a dry run without one."""


@dataclass
class MetaMorphTrainingArguments(RunTrainingArguments):
    """All flags of `transformers.TrainingArguments`, with the guide's defaults, and our own.

    Weights are kept in float32; `bf16` and `fp16` set the precision of the computation (autocast). Without a GPU the
    run falls back to the CPU. A dry run needs neither the GPUs nor the engine that it plans for.
    """

    unsupported = UNSUPPORTED

    learning_rate: float | str = 5e-5
    """Peak learning rate; the default is that of Transformers, and a run that uses it logs a warning. `auto` is
    `base_learning_rate` × √(samples per step / `base_batch_size`), the rule of the training guide."""
    base_learning_rate: float | None = None
    """For `learning_rate="auto"`: a learning rate that works well with `base_batch_size`."""
    base_batch_size: int | None = None
    """For `learning_rate="auto"`: samples per optimizer step that `base_learning_rate` was tuned for."""
    dp_replicate: int = 1
    """With `sharding="fsdp2"`: divide the training state within each of this many groups of GPUs, such as one for each
    machine, instead of among all GPUs (hybrid sharding). Only gradients are then exchanged between groups."""
    weight_decay: float = 0.0
    """Weight decay of AdamW, except for norms and biases."""
    lr_scheduler_type: str = field(default="cosine", metadata={"choices": SCHEDULES})
    """Learning rate schedule."""
    warmup_ratio: float = 0.03
    """Fraction of the optimizer steps used for warm-up, in [0, 1). Ignored when `warmup_steps` is given."""
    warmup_steps: float = 0
    """Optimizer steps of warm-up (below 1: their fraction); 0 uses `warmup_ratio`."""
    evaluation_strategy: str | None = None
    """Name of `eval_strategy` in Transformers 4, still accepted."""
    bf16: bool = True
    """Compute in bfloat16, with float32 weights."""
    fp16: bool = False
    """Compute in float16, with float32 weights; needs `bf16=False`."""
    loss_normalization: str = field(default="global", metadata={"choices": LOSS_NORMALIZATIONS})
    """`global` divides each loss by its tokens in all micro-batches and ranks of the optimizer step; `micro_batch`
    averages every micro-batch separately, as the original system did."""
    packing: bool = True
    """Put several samples into a row of `model_max_length` tokens, without attending to each other. Batches are then
    counted in rows: see `per_device_train_batch_size`. False pads every sample to the longest of its batch."""
    per_device_train_batch_size: int = 8
    """Rows per process and micro-batch. With `packing` a row holds as many samples as fit into `model_max_length`
    tokens, otherwise one sample."""
    train_sampling_strategy: str = field(default="random", metadata={"choices": SAMPLING_STRATEGIES})
    """Order of the samples: random, sequential, or (only with `packing=False`) group_by_length, which puts samples of
    similar length into one step."""
    group_by_length: bool = False
    """Transformers 4's form of `train_sampling_strategy="group_by_length"`, still accepted."""
    mm_projector_lr: float | None = None
    """Learning rate of the connector and, in stage 1, of the rows of the new tokens; defaults to `learning_rate`."""
    vision_lr: float | None = None
    """Learning rate of the vision tower (with `freeze_vision=False`); defaults to `learning_rate`."""
    vision_head_lr: float | None = None
    """Learning rate of the vision head; defaults to `learning_rate`."""
    label_names: list[str] | None = None
    """Inputs that are labels; defaults to `labels`."""
    hub_strategy: str = "end"
    """When `push_to_hub` uploads: end, when the result is complete; every_save, checkpoint and all_checkpoints as in
    Transformers, which then uploads the parts of a checkpoint that it knows."""
    text_loss: str = field(default="auto", metadata={"choices": TEXT_LOSSES})
    """Implementation of the text loss; the result is the same. `full` computes the logits of all supervised tokens at
    once; `chunked` some at a time, and again for the backward pass; `fused` uses PyTorch 2.13's operator, in float32
    only; `liger` uses liger-kernel, on a GPU. `auto` picks one: `full` where there are few logits."""
    recompute: str = field(default="none", metadata={"choices": RECOMPUTE})
    """What the backward pass recomputes instead of keeping: `none`; `full`, all but the input of each layer, as
    `gradient_checkpointing` does; or `selective`, everything between matrix products and attention. Saves memory, costs
    time."""
    allow_changes: list[str] | None = None
    """Flags that may differ from the checkpoint that the run resumes from, such as `vision_coef lr_scheduler_type`;
    otherwise such a change is an error."""

    sample_steps: int | None = None
    """Answer the prompts of `sample_prompts` every this many optimizer steps, into `output_dir`/samples and the
    tracker; by default never."""
    sample_prompts: str | None = None
    """Prompts for `sample_steps`: a text file with one per line, or JSON Lines of `{"prompt": "…", "images": ["…"],
    "draw": true}`."""
    sample_visualizer: str | None = None
    """Folder of a visualizer that draws the images of these answers; without it their visual tokens are saved."""
    eval_specs: list[str] | None = None
    """Benchmarks to run whenever the model is evaluated (`eval_strategy`), each as `SPEC=DATA:LIMIT`, such as
    `mmvp=/data/MMVP:100`: a name of `metamorph evaluate --list` or a YAML file, its data, and the number of samples."""
    eval_visualizer: str | None = None
    """Folder of the visualizer for benchmarks in `eval_specs` that judge images."""
    peak_tflops: float | None = None
    """Peak of one device in 10¹² FLOP/s, for `mfu` in the log; defaults to the data sheet of the GPU."""

    dry_run: InitVar[bool] = False  # a flag of DryRunArguments

    def __post_init__(self, dry_run: bool) -> None:
        self._is_dry_run = dry_run
        if dry_run and self.output_dir is None:
            self.output_dir: Any = NOT_GIVEN
        self.check_values()
        self._check_samples()
        for name in self.allow_changes or ():
            check_choice("--allow_changes", name, CHANGEABLE)
        check_text_loss(self.text_loss, half_precision=self.bf16 or self.fp16)
        if self.group_by_length:
            self.train_sampling_strategy = "group_by_length"
        check_grouping(self.packing, self.train_sampling_strategy == "group_by_length")
        if self.bf16 and self.fp16:
            raise ValueError("--fp16 True and --bf16 True exclude each other: add --bf16 False")
        self._check_learning_rates()
        self._check_ranges()
        if self.evaluation_strategy is not None:
            self.eval_strategy = self.evaluation_strategy
        if self.do_eval and self.eval_strategy == "no" and not self.eval_on_start:
            raise ValueError("--do_eval True has no effect with --eval_strategy no: add --eval_strategy steps or epoch")
        if self.metric_for_best_model is not None and self.eval_strategy == "no":
            raise ValueError(
                f"--metric_for_best_model {self.metric_for_best_model} is never measured with --eval_strategy no: add "
                "--eval_strategy steps or epoch, and --eval_data_path or --eval_specs"
            )
        if self.label_names is None:
            self.label_names = ["labels"]
        with self._without_engine():
            super().__post_init__()
            replicate_shards(self, self.sharding, self.dp_replicate)
        self._check_schedule()

    @contextmanager
    def _without_engine(self) -> Iterator[None]:
        """Set no engine up in a dry run, which may be on a machine without GPUs; its flags stay as they are."""
        if self._is_dry_run:
            check_engine_flags(self, self.sharding)
        given = {name: getattr(self, name) for name in ENGINE_FLAGS} if self._is_dry_run else {}
        for name in given:
            setattr(self, name, ENGINE_FLAGS[name])
        yield
        for name, value in given.items():
            setattr(self, name, value)

    def _check_device(self) -> None:
        if not self._is_dry_run:
            super()._check_device()

    def _check_samples(self) -> None:
        if (self.sample_steps is None) != (self.sample_prompts is None):
            raise ValueError(
                f"--sample_steps {self.sample_steps} and --sample_prompts {self.sample_prompts} go together: give both"
            )
        self.check_at_least(1, "sample_steps")
        for name, needed in (("sample_visualizer", "sample_steps"), ("eval_visualizer", "eval_specs")):
            visualizer = getattr(self, name)
            if visualizer is not None:
                if not getattr(self, needed):
                    raise ValueError(f"--{name} {visualizer} needs --{needed}")
                setattr(self, name, shipped_folder(visualizer, "visualizer"))
                check_model_reference(getattr(self, name), flag=f"--{name}", file="model_index.json")

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
            if getattr(self, name) is None and auto:
                raise ValueError(
                    f"--learning_rate {AUTO_LEARNING_RATE} needs --{name}: give a learning rate that works well and "
                    "the samples per step it was tuned for (in the training guide, for stage 2: --base_learning_rate "
                    "6.93e-5 --base_batch_size 1536)"
                )

    def _check_ranges(self) -> None:
        self.check_at_least(1, "dp_replicate")
        if self.max_steps != -1 and self.max_steps < 1:
            raise ValueError(
                f"--max_steps {self.max_steps} must be at least 1, or -1 for --num_train_epochs; --dry-run shows what "
                "a run would do"
            )
        if self.max_steps == -1:
            self.check_at_least(0, "num_train_epochs", above=True)
        self.check_at_least(0, "base_learning_rate base_batch_size neftune_noise_alpha peak_tflops", above=True)
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"--warmup_ratio {self.warmup_ratio} must lie in [0, 1)")
        if self.warmup_steps and self.lr_scheduler_type in NO_WARMUP:
            raise ValueError(
                f"--warmup_steps {self.warmup_steps} has no effect with --lr_scheduler_type {self.lr_scheduler_type}, "
                "which has no warm-up: use constant_with_warmup, or drop --warmup_steps"
            )
        if not self.warmup_steps:
            self.warmup_steps = self.warmup_ratio  # Transformers 5 reads a value below 1 as a ratio

    def _check_schedule(self) -> None:
        """Build the schedule once, to find wrong `lr_scheduler_kwargs` before the weights are loaded."""
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
