"""All flags of a training run in one object, and the values that follow from several of them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from metamorph.training.arguments.data import DataArguments
from metamorph.training.arguments.model import ModelArguments
from metamorph.training.arguments.training import MetaMorphTrainingArguments


@dataclass(frozen=True)
class RunArguments:
    """The three groups of flags of `metamorph train`."""

    model: ModelArguments
    data: DataArguments
    training: MetaMorphTrainingArguments

    @property
    def data_seed(self) -> int:
        """Seed of the order of the samples and of everything random in them."""
        return self.training.seed if self.training.data_seed is None else self.training.data_seed

    @property
    def image_aspect_ratio(self) -> str | None:
        """`--image_aspect_ratio`; None if it is not given."""
        return self.data.image_aspect_ratio if self.data.is_given("image_aspect_ratio") else None

    @property
    def compute_dtype(self) -> torch.dtype:
        """Precision of matrix products."""
        return torch.bfloat16 if self.training.bf16 else torch.float16 if self.training.fp16 else torch.float32

    @property
    def encodes_images(self) -> bool:
        """Whether the vision tower runs: in training without a feature cache, in validation, or for prompts."""
        needs_tower = self.data.eval_data_path is not None or self.training.sample_steps is not None
        return self.data.feature_cache is None or needs_tower or bool(self.training.eval_specs)

    def save(self, folder: str) -> None:
        """Write the model and data flags to `model_and_data_args.json`; the trainer writes `training_args.json`."""
        values = asdict(self.model) | asdict(self.data)
        (Path(folder) / "model_and_data_args.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
