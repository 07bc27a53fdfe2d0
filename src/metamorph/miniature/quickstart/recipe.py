"""All numbers of the quickstart: how much data, how long each stage trains, how much is evaluated."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from metamorph.miniature.world.dataset import WorldSizes


NUM_IMAGE_TOKENS = 16
"""Visual tokens of a 64×64 image: mini-siglip's 8×8 patches reduced to 4×4."""


@dataclass(frozen=True)
class EvaluationSizes:
    """Number of evaluated records of each kind."""

    vqa: int = 400
    """Questions about images."""
    seen: int = 96
    """Drawing prompts for (colour, shape) pairs that training drew; the third or so with two objects is reported as
    `pairs`."""
    held_out: int = 48
    """Drawing prompts for pairs that training never drew."""
    knowledge: int = 32
    """Drawing prompts that need a fact about a thing that training never drew."""
    edit: int = 48
    """Instructions that change an image."""
    next_frame: int = 24
    """Moving objects."""
    visualizer: int = 64
    """Images reconstructed from their true tokens."""

    @property
    def largest(self) -> int:
        """Number of records in the largest evaluation file."""
        return max(vars(self).values())


@dataclass(frozen=True)
class Recipe:
    """Settings of one run of the quickstart."""

    sizes: WorldSizes
    """Number of training records; `evaluation` decides the size of the evaluation files."""
    evaluation: EvaluationSizes = EvaluationSizes()
    batch_size: int = 32
    """Records per step of both stages."""
    stage1_steps: int = 100
    stage1_lr: float = 3e-3
    """Peak learning rate of stage 1."""
    stage2_steps: int = 700
    stage2_lr: float = 3e-3
    """Peak learning rate of stage 2."""
    stage2_adam_beta2: float = 0.98
    """Decay of AdamW's second moment in stage 2; lower than the usual 0.999 because the run is short."""
    stage2_save_steps: int = 0
    """Steps of stage 2 between checkpoints; 0 saves none."""
    vision_coef: float = 4.0
    """Weight of the visual loss in stage 2."""
    alignment_steps: int = 800
    """Steps that fit the visualizer's projector to mini-sd's own conditions; a hundred take a second."""
    visualizer_steps: int = 150
    visualizer_batch_size: int = 16
    visualizer_lr: float = 5e-4
    """Peak learning rate of the projector."""
    guidance_scale: float = 2.0
    """Guidance scale in evaluation."""
    sampling_steps: int = 15
    """Denoising steps in evaluation."""

    @property
    def world_sizes(self) -> WorldSizes:
        """Number of records of all files."""
        return replace(self.sizes, evaluation=self.evaluation.largest)

    def stage1_flags(self) -> dict[str, Any]:
        """Flags of `metamorph train` for stage 1, without the paths."""
        return {
            "tune_mm_mlp_adapter": True,
            "max_steps": self.stage1_steps,
            "learning_rate": self.stage1_lr,
            **self._common_flags(),
        }

    def stage2_flags(self) -> dict[str, Any]:
        """Flags of `metamorph train` for stage 2, without the paths."""
        every = self.stage2_save_steps
        checkpoints = {"save_strategy": "steps", "save_steps": every, "save_total_limit": 1} if every else {}
        return {
            "vision_coef": self.vision_coef,
            "max_steps": self.stage2_steps,
            "learning_rate": self.stage2_lr,
            "adam_beta2": self.stage2_adam_beta2,
            **self._common_flags(),
            **checkpoints,
        }

    def visualizer_flags(self) -> dict[str, Any]:
        """Flags of `metamorph train-visualizer`, without the paths."""
        return {
            "num_tokens": NUM_IMAGE_TOKENS,
            "mode": "mlp",
            "hidden_dim": 256,
            "normalize_input": True,
            "learn_positions": True,
            "cache_latents": True,
            "training_steps": self.visualizer_steps,
            "batch_size": self.visualizer_batch_size,
            "lr": self.visualizer_lr,
            "lr_scheduler": "cosine",
            "lr_warmup_steps": self.visualizer_steps // 20,
            "weight_decay": 0.0,
            "timestep_power": 0.6,
            "ema_decay": 0.95,
            "save_step": 0,
        }

    def _common_flags(self) -> dict[str, Any]:
        return {
            "num_image_tokens": NUM_IMAGE_TOKENS,
            "model_max_length": 512,
            "packing": False,
            "per_device_train_batch_size": self.batch_size,
            "weight_decay": 0.01,
            "warmup_ratio": 0.05,
            "logging_steps": 5,
            "save_strategy": "no",
            "report_to": "none",
            "dataloader_pin_memory": False,
            "bf16": False,
        }


FULL = Recipe(
    sizes=WorldSizes(
        captions=3200,
        vqa=5000,
        text_vqa=400,
        text_to_image=8000,
        edits=6000,
        next_frames=2500,
        facts=500,
        knowledge_prompts=1200,
        visualizer=1500,
        pair_fraction=0.45,
    ),
)
"""What `metamorph quickstart` runs."""

MINI = Recipe(
    sizes=WorldSizes(
        captions=6400,
        vqa=10_000,
        questions_per_image=4,
        text_vqa=500,
        text_to_image=24_000,
        edits=24_000,
        next_frames=10_000,
        facts=1000,
        knowledge_prompts=3000,
        visualizer=2500,
        pair_fraction=0.5,
    ),
    stage1_steps=200,
    stage2_steps=2400,
    stage2_lr=1.5e-3,
    stage2_adam_beta2=0.999,
    stage2_save_steps=400,
    alignment_steps=2000,
    visualizer_steps=300,
    evaluation=EvaluationSizes(vqa=1000, seen=192, held_out=96, knowledge=64, edit=96, next_frame=48, visualizer=128),
)
"""What `python -m tools.miniature.rebuild mini` runs: more of everything, above all edits."""

MINI_EVALUATION_SEED = 1000
"""Seed of the records that mini is evaluated on; no build or tuning uses it."""

FAST = Recipe(
    sizes=WorldSizes(
        captions=64,
        vqa=64,
        text_vqa=16,
        text_to_image=64,
        edits=32,
        next_frames=16,
        facts=16,
        knowledge_prompts=16,
        visualizer=48,
    ),
    batch_size=16,
    stage1_steps=6,
    stage2_steps=12,
    alignment_steps=10,
    visualizer_steps=4,
    visualizer_batch_size=8,
    sampling_steps=3,
    evaluation=EvaluationSizes(vqa=24, seen=8, held_out=6, knowledge=4, edit=8, next_frame=4, visualizer=8),
)
"""What `metamorph quickstart --fast` runs: every part, far too short to learn anything."""
