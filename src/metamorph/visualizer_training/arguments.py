"""The flags of `metamorph train-visualizer`, checked before anything is loaded."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from metamorph.flags.checks import check_choice, check_output_folder
from metamorph.mini import shipped_folder
from metamorph.visualization.projector import CONDITION_LENGTH, PROJECTOR_MODES
from metamorph.visualization.token_options import TokenOptions
from metamorph.visualizer_training.schedule import DEFAULT_LR_SCHEDULER, LR_SCHEDULERS


MIXED_PRECISIONS = ("no", "bf16")
TRACKERS = ("none", "tensorboard", "wandb")
SHARDINGS = ("ddp", "fsdp2")
ON_BAD_IMAGE = ("raise", "skip")
LATEST = "latest"
"""Value of `resume_from_checkpoint` that means the newest checkpoint of `output_dir`; so does no value."""


@dataclass
class VisualizerArguments(TokenOptions):
    """What the visualizer is made of, what it sees and how it is trained.

    Raises:
        ValueError: for a value outside its domain; the message names the flag and the mend.
        FileNotFoundError: for files and folders of data that do not exist.
    """

    output_dir: str
    """Folder of the result, a diffusers pipeline, and of the checkpoints."""

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
    sharding: str = "ddp"
    """What several processes share: ddp keeps the whole model on each, fsdp2 divides weights, gradients and optimizer
    among them."""
    torch_compile: bool = False
    """Compile the projector and the blocks of the UNet: the first steps take minutes, the others less time."""
    gradient_checkpointing: bool = False
    """Recompute the UNet's activations in the backward pass: less memory, more time."""

    mode: str = "mlp"
    """Form of the projector: mlp, xattn, xattnffn or transformer."""
    num_query_tokens: int = CONDITION_LENGTH
    """Condition tokens that leave xattn, xattnffn and transformer; mlp emits as many as it receives."""
    hidden_dim: int = 2048
    """Hidden width of the projector in modes mlp and transformer."""
    num_layers: int = 2
    """Layers of the projector."""
    num_heads: int = 8
    """Attention heads of the projector in the modes that attend."""
    normalize_input: bool = False
    """Apply a LayerNorm to the visual tokens before the projector."""
    learn_positions: bool = False
    """Add a learned embedding of its place to each visual token before the projector."""
    pretrained_projector: str | None = None
    """Start from the projector in this folder: a finished visualizer, or its subfolder projector."""

    alignment_conditions: str | None = None
    """Safetensors file with the diffusion model's own `conditions` [pictures, tokens, features] of the pictures, in
    their order: the projector is fitted to them before training. Needs cache_latents."""
    alignment_steps: int = 1000
    """Optimizer steps of that fit; they do not run the UNet."""
    alignment_lr: float = 3e-3
    """Peak learning rate of that fit."""

    image_folder: str | None = None
    """Folder of pictures (jpg, jpeg, png, webp) or of tar shards with pictures, searched with its subfolders; or the
    root of paths in image_jsons."""
    image_jsons: list[str] = field(default_factory=list)
    """JSON or JSONL files that list tar shards or pictures: paths, or records with a key image, jpg, jpeg, png or
    webp."""
    on_bad_image: str = "raise"
    """What happens with a picture that cannot be read, or a shard that is cut off: raise, or skip (count, log and leave
    out)."""
    max_bad_fraction: float = 0.01
    """Largest share of skipped pictures, between 0 and 1; above it the run stops."""
    resolution: int | None = None
    """Side of the pictures in pixels; by default that of the diffusion model: the sample_size of its UNet × the scale
    factor of its VAE."""
    random_crop: bool = False
    """Cut the square at a random place instead of from the centre."""
    cache_latents: bool = False
    """Encode every picture once, before training, and keep tokens and latents in memory."""
    dataloader_num_workers: int = 0
    """Processes that load pictures; 0 loads them in the training process."""

    training_steps: int = 16_000
    """Optimizer steps, and the horizon of the learning-rate schedule."""
    batch_size: int = 32
    """Pictures per process and forward pass."""
    gradient_accumulation_steps: int = 1
    """Forward passes per optimizer step."""
    lr: float = 1e-4
    """Peak learning rate."""
    unet_lr: float | None = None
    """Peak learning rate of the UNet; by default lr."""
    lr_scheduler: str = DEFAULT_LR_SCHEDULER
    """Schedule: log_warmup_linear_decay, constant, constant_with_warmup, linear or cosine."""
    lr_warmup_steps: int | None = None
    """Optimizer steps of warm-up; by default a quarter of training_steps."""
    weight_decay: float = 1e-2
    """Weight decay of AdamW."""
    max_grad_norm: float = 1.0
    """Largest norm of the gradient; longer ones are scaled down. 0 switches clipping off."""
    ema_decay: float = 0.9999
    """Decay of the moving average of the weights, which is what is saved; 0 switches it off."""
    mixed_precision: str = "no"
    """Compute in bf16 or, with no, in float32."""
    cfg_prob: float = 0.1
    """Share of samples whose whole condition is replaced by zeros, for classifier-free guidance."""
    timestep_power: float = 1.0
    """Timesteps are drawn as T·u^power with uniform u; below 1 favours high noise, where the layout is decided."""
    noise_offset: float = 0.0
    """Size of an extra noise that is constant over each channel of a picture."""
    snr_gamma: float | None = None
    """Cap of the signal-to-noise ratio in min-SNR loss weights; no weights by default."""
    seed: int = 0
    """Seed of initial weights, order of pictures, crops and noise."""
    full_determinism: bool = False
    """Deterministic algorithms on a GPU, too, so that the seed decides the weights bit for bit; slower. On a CPU it is
    always so."""

    save_step: int = 1000
    """Optimizer steps between checkpoints; 0 saves the final result only."""
    save_total_limit: int | None = 2
    """Checkpoints to keep; the oldest are removed. None keeps all."""
    resume_from_checkpoint: str | None = None
    """Checkpoint folder to go on from. By default (or `latest`) the newest undamaged one in output_dir, if there is
    one; with `True` there must be one; `False` starts anew."""
    model_license: str | None = None
    """Licence that the model card of the result names; without it the card calls the licence unknown."""
    data_license: str | None = None
    """Licence of the pictures that the model card of the result names; without it the card calls it unknown."""
    save_vision_tower: bool = False
    """Write the vision tower into the result too, so that `pipe(images=…)` can encode pictures; a large tower makes the
    folder as much larger."""
    logging_steps: int = 10
    """Optimizer steps between entries of the log."""
    report_to: str = "none"
    """Tracker: none, tensorboard or wandb."""
    validation_images: list[str] = field(default_factory=list)
    """Pictures that are drawn again from their own tokens at every checkpoint."""
    validation_guidance_scales: list[float] = field(default_factory=lambda: [1.0, 3.0])
    """Guidance scales of these drawings, one column each."""

    def __post_init__(self) -> None:
        self.vision_tower = shipped_folder(self.vision_tower, "model")
        self.pretrained_model_name_or_path = shipped_folder(self.pretrained_model_name_or_path, "visualizer")
        if self.pretrained_projector is not None:
            self.pretrained_projector = shipped_folder(self.pretrained_projector, "visualizer")
        self._check_choices()
        self._check_ranges()
        self._check_combinations()
        self._check_paths()

    @property
    def warmup_steps(self) -> int:
        """Optimizer steps of warm-up."""
        return self.training_steps // 4 if self.lr_warmup_steps is None else self.lr_warmup_steps

    def to_dict(self) -> dict[str, Any]:
        """All values by name, ready for JSON."""
        return asdict(self)

    def _check_choices(self) -> None:
        for name, allowed in (
            ("mode", PROJECTOR_MODES),
            ("lr_scheduler", LR_SCHEDULERS),
            ("mixed_precision", MIXED_PRECISIONS),
            ("report_to", TRACKERS),
            ("on_bad_image", ON_BAD_IMAGE),
            ("sharding", SHARDINGS),
        ):
            check_choice(f"--{name}", getattr(self, name), allowed)

    def _check_ranges(self) -> None:
        at_least = {
            1: (
                "num_tokens num_query_tokens hidden_dim num_layers num_heads resolution training_steps batch_size "
                "gradient_accumulation_steps logging_steps alignment_steps"
            ),
            0: "save_step dataloader_num_workers max_grad_norm weight_decay noise_offset seed",
        }
        for least, names in at_least.items():
            for name in names.split():
                value = getattr(self, name)
                if value is not None and not (math.isfinite(value) and value >= least):
                    raise ValueError(f"--{name} {value} must be {least} or more")
        for name in ("lr", "unet_lr", "alignment_lr", "timestep_power", "snr_gamma", "save_total_limit"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"--{name} {value} must be larger than 0")
        for name in ("cfg_prob", "ema_decay"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ValueError(f"--{name} {value} must be at least 0 and less than 1")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"--max_bad_fraction {self.max_bad_fraction} must lie between 0 and 1")
        if not 0 <= self.warmup_steps <= self.training_steps:
            raise ValueError(
                f"--lr_warmup_steps {self.warmup_steps} must lie between 0 and --training_steps {self.training_steps}"
            )

    def _check_combinations(self) -> None:
        if self.unet_from_scratch and not self.unfreeze_unet:
            raise ValueError("--unet_from_scratch without --unfreeze_unet keeps a random UNet frozen; set both")
        if self.unet_lr is not None and not self.unfreeze_unet:
            raise ValueError(
                f"--unet_lr {self.unet_lr} has no effect without --unfreeze_unet; set it or drop --unet_lr"
            )
        if self.alignment_conditions is not None and not self.cache_latents:
            raise ValueError("--alignment_conditions needs the tokens of all pictures; set --cache_latents")
        if self.alignment_conditions is not None and self.sharding != "ddp":
            raise ValueError(f"--alignment_conditions needs the whole projector; drop --sharding {self.sharding}")
        if self.cache_latents and self.random_crop:
            raise ValueError("--cache_latents keeps one crop of each picture; drop it or --random_crop")
        if not self.validation_guidance_scales:
            raise ValueError("--validation_guidance_scales is empty; give at least one number")
        if (least := min(self.validation_guidance_scales)) < 0:
            raise ValueError(f"--validation_guidance_scales {least} must be 0 or more")

    def _check_paths(self) -> None:
        check_output_folder(self.output_dir, "--output_dir")
        if self.image_folder is not None and not Path(self.image_folder).expanduser().is_dir():
            raise FileNotFoundError(f"--image_folder {self.image_folder} is not a folder")
        conditions = [] if self.alignment_conditions is None else [self.alignment_conditions]
        for flag, paths in (
            ("--image_jsons", self.image_jsons),
            ("--validation_images", self.validation_images),
            ("--alignment_conditions", conditions),
        ):
            for path in paths:
                if not Path(path).expanduser().is_file():
                    raise FileNotFoundError(f"{flag} {path} is not a file")
