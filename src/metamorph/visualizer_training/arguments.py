"""The flags of `metamorph train-visualizer`, checked before anything is loaded."""

import math
import os
from dataclasses import dataclass, field, fields
from pathlib import Path

from metamorph.data.records import ON_BAD_RECORD
from metamorph.flags.checks import check_choice
from metamorph.mini import shipped_folder
from metamorph.training.arguments.sharding import FSDP2_CONFIG
from metamorph.training.arguments.shared import RunTrainingArguments
from metamorph.visualization.projector import CONDITION_LENGTH, PROJECTOR_MODES
from metamorph.visualization.token_options import TokenOptions


DEFAULT_LR_SCHEDULER = "log_warmup_linear_decay"
LR_SCHEDULERS = (DEFAULT_LR_SCHEDULER, "constant", "constant_with_warmup", "linear", "cosine")
NAMES_IN_TRANSFORMERS = {
    "training_steps": "max_steps",
    "batch_size": "per_device_train_batch_size",
    "lr": "learning_rate",
    "lr_scheduler": "lr_scheduler_type",
    "save_step": "save_steps",
}
"""Flags that have another name in Transformers' Trainer; both are accepted."""
_ENGINES = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM")
"""Variables by which `accelerate launch` asks for an engine."""
_FSDP_CONFIG = FSDP2_CONFIG | {"min_num_params": 0, "xla": False, "xla_fsdp_v2": False, "xla_fsdp_grad_ckpt": False}
"""What Transformers makes of `FSDP2_CONFIG`."""
_REFUSED = {
    "training draws --validation_images at its checkpoints; `metamorph evaluate visualizer` measures": (
        "batch_eval_metrics bf16_full_eval do_eval do_predict eval_accumulation_steps eval_delay eval_on_start "
        "eval_do_concat_batches eval_steps eval_strategy eval_use_gather_object fp16_full_eval greater_is_better "
        "include_for_metrics load_best_model_at_end metric_for_best_model per_device_eval_batch_size "
        "prediction_loss_only"
    ),
    "it is for language models": (
        "average_tokens_across_devices include_num_input_tokens_seen label_names label_smoothing_factor "
        "length_column_name liger_kernel_config neftune_noise_alpha use_cache use_liger_kernel"
    ),
    "each image comes once in an epoch, in an order that --seed decides": (
        "auto_find_batch_size data_seed dataloader_drop_last dataloader_in_order ignore_data_skip "
        "remove_unused_columns train_sampling_strategy"
    ),
    "upload the result by `hf upload`": (
        "push_to_hub hub_always_push hub_model_id hub_private_repo hub_revision hub_strategy hub_token"
    ),
    "a signal makes all processes save after the same step, without a flag": "enable_jit_checkpoint",
    "all machines share --output_dir": "save_on_each_node",
    "a run resumes from its checkpoints": "save_only_model",
    "diffusers takes none": "gradient_checkpointing_kwargs activation_checkpointing_kwargs",
    "only GaLore and APOLLO read it, which are not supported": "optim_target_modules",
    "the schedules of --lr_scheduler take none": "lr_scheduler_kwargs",
    "--training_steps is the length of a run": "num_train_epochs",
    "use --mixed_precision bf16": "fp16",
    "use --sharding fsdp2": "deepspeed parallelism_config",
    "the logged loss is the mean of all steps": "logging_nan_inf_filter",
}
UNSUPPORTED = {
    item.name: ((item.default_factory() if callable(item.default_factory) else item.default,), reason)
    for reason, names in _REFUSED.items()
    for item in fields(RunTrainingArguments)
    if item.name in names.split()
}
"""Flags of Transformers that would have no effect here: the only accepted value, and the reason."""


@dataclass
class VisualizerArguments(TokenOptions, RunTrainingArguments):
    """Parts, data and training of the visualizer.

    Flags of `transformers.TrainingArguments` that have an effect here are accepted, too. Some have a shorter name here
    (`NAMES_IN_TRANSFORMERS`), which counts if both are given.
    """

    unsupported = UNSUPPORTED

    pretrained_model_name_or_path: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    """Stable Diffusion model, a folder or Hub id with the subfolders unet, vae and scheduler."""
    revision: str | None = None
    """Revision of that Hub repository: a branch, tag or commit."""
    variant: str | None = None
    """Variant of its weight files, for example fp16."""
    unfreeze_unet: bool = False
    """Train the UNet too; otherwise only the projector is trained."""
    unet_from_scratch: bool = False
    """Start from a randomly initialised UNet of the same configuration; needs unfreeze_unet."""
    sharding: str = field(default="ddp", metadata={"choices": ("ddp", "fsdp2")})
    """What several processes share: ddp keeps the full model on each, fsdp2 shards weights, gradients and optimizer."""
    torch_compile: bool = False
    """Compile the projector and the blocks of the UNet: the first steps take minutes, later ones are faster."""
    gradient_checkpointing: bool = False
    """Recompute the UNet's activations in the backward pass: less memory, more time."""

    mode: str = field(default="mlp", metadata={"choices": PROJECTOR_MODES})
    """Form of the projector: mlp, xattn, xattnffn or transformer."""
    num_query_tokens: int = CONDITION_LENGTH
    """Condition tokens that xattn, xattnffn and transformer return; mlp returns one for each visual token."""
    hidden_dim: int = 2048
    """Hidden width of the projector in modes mlp and transformer."""
    num_layers: int = 2
    """Layers of the projector."""
    num_heads: int = 8
    """Attention heads of the projector in the modes that attend."""
    normalize_input: bool = False
    """Apply a LayerNorm to the visual tokens before the projector."""
    learn_positions: bool = False
    """Add a learned position embedding to each visual token before the projector."""
    pretrained_projector: str | None = None
    """Start from the projector in this folder: a finished visualizer, or its subfolder projector."""

    image_folder: str | None = None
    """Folder with images (jpg, jpeg, png, webp) or tar archives of images, including its subfolders; or the root of
    paths in image_jsons."""
    image_jsons: list[str] = field(default_factory=list)
    """JSON or JSONL lists of images or tar archives: paths, or records with a key image, jpg, jpeg, png or webp."""
    on_bad_image: str = field(default="raise", metadata={"choices": ON_BAD_RECORD})
    """What to do with an image that cannot be read, or a damaged archive: raise, or skip (count, log and leave out)."""
    max_bad_fraction: float = 0.01
    """Largest share of skipped images, between 0 and 1; above it the run stops."""
    resolution: int | None = None
    """Side of the images in pixels; by default that of the diffusion model: the sample_size of its UNet × the scale
    factor of its VAE."""
    random_crop: bool = False
    """Cut the square at a random place instead of from the centre."""
    cache_latents: bool = False
    """Encode every image once, before training, and keep tokens and latents in memory; several processes share them, by
    files in output_dir while they train."""

    training_steps: int = 16_000
    """Optimizer steps, and the horizon of the learning-rate schedule."""
    batch_size: int = 32
    """Images per process and forward pass."""
    lr: float = 1e-4
    """Peak learning rate."""
    unet_lr: float | None = None
    """Peak learning rate of the UNet; by default lr."""
    lr_scheduler: str = field(default=DEFAULT_LR_SCHEDULER, metadata={"choices": LR_SCHEDULERS})
    """Schedule: log_warmup_linear_decay, constant, constant_with_warmup, linear or cosine."""
    lr_warmup_steps: int | None = None
    """Optimizer steps of warm-up; by default a quarter of training_steps."""
    weight_decay: float = 1e-2
    """Weight decay of AdamW."""
    optim: str = "adamw_torch_fused"
    """Optimizer, by its name in Transformers."""
    ema_decay: float = 0.9999
    """Decay of the moving average of the weights, which is saved instead of them; 0 switches it off."""
    mixed_precision: str = field(default="no", metadata={"choices": ("no", "bf16")})
    """Compute in bf16 or, with no, in float32."""
    cfg_prob: float = 0.1
    """Share of samples whose condition is replaced by zeros, for classifier-free guidance."""
    timestep_power: float = 1.0
    """Timesteps are sampled as T·u^power with uniform u; below 1 favours high noise, where the layout is decided."""
    noise_offset: float = 0.0
    """Size of an additional noise that is constant over each channel of an image."""
    snr_gamma: float | None = None
    """Limit of the signal-to-noise ratio in min-SNR loss weights; no weights by default."""
    seed: int = 0
    """Seed of initial weights, order of images, crops and noise."""
    full_determinism: bool = False
    """Use deterministic algorithms on a GPU, too, as a CPU always does: bit-identical runs, but slower."""

    save_step: int = 1000
    """Optimizer steps between checkpoints; 0 saves the final result only."""
    model_license: str | None = None
    """Licence of the result in its model card; unknown by default."""
    data_license: str | None = None
    """Licence of the images in the model card of the result; unknown by default."""
    save_vision_tower: bool = False
    """Write the vision tower, which may be large, into the result, too: `pipe(images=…)` can then encode images."""
    validation_images: list[str] = field(default_factory=list)
    """Images that are reconstructed from their visual tokens at every checkpoint."""
    validation_guidance_scales: list[float] = field(default_factory=lambda: [1.0, 3.0])
    """Guidance scales of these reconstructions, one column each."""

    def __post_init__(self) -> None:
        self._read_names_of_transformers()
        self.check_values()
        self.vision_tower = shipped_folder(self.vision_tower, "model")
        self.pretrained_model_name_or_path = shipped_folder(self.pretrained_model_name_or_path, "visualizer")
        if self.pretrained_projector is not None:
            self.pretrained_projector = shipped_folder(self.pretrained_projector, "visualizer")
        self._check_engine()
        self._check_ranges()
        self._check_combinations()
        self._check_paths()
        self._set_names_of_transformers()
        super().__post_init__()
        # Without bf16, Transformers takes the precision of `accelerate launch`, which is not one of our flags.
        self.mixed_precision = "bf16" if self.bf16 else "no"

    def _read_names_of_transformers(self) -> None:
        """Copy values that are given only by their name in Transformers."""

        def only(theirs: str, ours: str) -> bool:
            return self.is_given(theirs) and not self.is_given(ours)

        for ours, theirs in NAMES_IN_TRANSFORMERS.items():
            if only(theirs, ours):
                setattr(self, ours, getattr(self, theirs))
        if only("bf16", "mixed_precision"):
            self.mixed_precision = "bf16" if self.bf16 else "no"
        if only("warmup_steps", "lr_warmup_steps"):
            self.lr_warmup_steps = self.get_warmup_steps(self.training_steps)  # below 1 it is a share of them
        if only("activation_checkpointing", "gradient_checkpointing"):
            self.gradient_checkpointing = bool(self.activation_checkpointing)
        check_choice("--save_strategy", self.save_strategy, ("steps", "no"))
        if only("save_strategy", "save_step") and self.save_strategy == "no":
            self.save_step = 0

    def _set_names_of_transformers(self) -> None:
        self.max_steps, self.per_device_train_batch_size = self.training_steps, self.batch_size
        self.learning_rate, self.bf16 = self.lr, self.mixed_precision == "bf16"
        self.warmup_steps = self.training_steps // 4 if self.lr_warmup_steps is None else self.lr_warmup_steps
        if self.lr_scheduler != DEFAULT_LR_SCHEDULER:  # Transformers does not have that one
            self.lr_scheduler_type = self.lr_scheduler
        self.save_strategy, self.save_steps = ("steps", self.save_step) if self.save_step else ("no", 1)
        if hasattr(self, "activation_checkpointing"):  # from Transformers 5.23 on the other name is deprecated
            self.activation_checkpointing = self.gradient_checkpointing
        fsdp, config = vars(self)["fsdp"], vars(self)["fsdp_config"]
        if fsdp or config:
            config = config if isinstance(config, dict) else {"file": config}
            if self.sharding != "fsdp2" or any(item not in _FSDP_CONFIG.items() for item in config.items()):
                raise ValueError("--fsdp and --fsdp_config are not supported: --sharding fsdp2 sets them")
            self.fsdp = self.fsdp_config = None  # derived again, also for a changed copy

    def _check_engine(self) -> None:
        for variable in _ENGINES[self.sharding == "fsdp2" :]:
            if os.environ.get(variable, "false").lower() == "true":
                raise ValueError(
                    f"accelerate launch has set {variable}: start the visualizer with torchrun, or with a "
                    "configuration without it; --sharding fsdp2 shards the model"
                )

    def _check_ranges(self) -> None:
        sizes = "num_tokens num_query_tokens hidden_dim num_layers num_heads resolution training_steps batch_size"
        self.check_at_least(1, f"{sizes} logging_steps")
        self.check_at_least(0, "save_step noise_offset lr_warmup_steps")
        for name in ("lr", "unet_lr", "timestep_power", "snr_gamma"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"--{name} {value} must be larger than 0")
        for name in ("cfg_prob", "ema_decay"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ValueError(f"--{name} {value} must be at least 0 and less than 1")
        if (self.lr_warmup_steps or 0) > self.training_steps:
            raise ValueError(
                f"--lr_warmup_steps {self.lr_warmup_steps} must be at most --training_steps {self.training_steps}"
            )

    def _check_combinations(self) -> None:
        if self.unet_from_scratch and not self.unfreeze_unet:
            raise ValueError("--unet_from_scratch without --unfreeze_unet keeps a random UNet frozen; set both")
        if self.unet_lr is not None and not self.unfreeze_unet:
            raise ValueError(
                f"--unet_lr {self.unet_lr} has no effect without --unfreeze_unet; set it or drop --unet_lr"
            )
        if self.cache_latents and self.random_crop:
            raise ValueError("--cache_latents keeps one crop of each image; drop it or --random_crop")
        if not self.validation_guidance_scales:
            raise ValueError("--validation_guidance_scales is empty; give at least one number")
        if (least := min(self.validation_guidance_scales)) < 0:
            raise ValueError(f"--validation_guidance_scales {least} must be 0 or more")

    def _check_paths(self) -> None:
        if self.image_folder is not None and not Path(self.image_folder).expanduser().is_dir():
            raise FileNotFoundError(f"--image_folder {self.image_folder} is not a folder")
        files = [("--image_jsons", file) for file in self.image_jsons]
        files += [("--validation_images", file) for file in self.validation_images]
        for flag, file in files:
            if not Path(file).expanduser().is_file():
                raise FileNotFoundError(f"{flag} {file} is not a file")
