"""The stages of the quickstart that train: each writes a recipe file and runs it as the command line would."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from metamorph.flags.recipes import parse_arguments
from metamorph.miniature.quickstart.conditions import write_conditions
from metamorph.miniature.quickstart.recipe import Recipe
from metamorph.miniature.world.dataset import WorldFiles
from metamorph.training.arguments import DataArguments, MetaMorphTrainingArguments, ModelArguments
from metamorph.training.reporting.progress import ShowProgress
from metamorph.training.run import TrainResult, run_training
from metamorph.visualizer_training.arguments import VisualizerArguments
from metamorph.visualizer_training.run import VisualizerResult, train_visualizer


BESIDE_BAR = {"text_loss": "text", "visual_loss": "visual", "visual_cosine": "cosine"}


@dataclass(frozen=True)
class Workspace:
    """The folders of one run."""

    root: Path
    """`--output-dir`."""
    assets: dict[str, Path]
    """Folders of mini-siglip, mini-llama and mini-sd."""
    seed: int
    """Seed of data, weights and noise."""

    @property
    def data(self) -> Path:
        """Records and pictures."""
        return self.root / "data"

    @property
    def connector(self) -> Path:
        """Result of stage 1."""
        return self.root / "connector"

    @property
    def model(self) -> Path:
        """Result of stage 2, for `metamorph generate --model`."""
        return self.root / "model"

    @property
    def visualizer(self) -> Path:
        """The visualizer, for `metamorph generate --visualizer`."""
        return self.root / "visualizer"

    @property
    def conditions(self) -> Path:
        """Mini-sd's own conditions of the visualizer's pictures."""
        return self.data / "conditions.safetensors"

    @property
    def pictures(self) -> Path:
        """PNG files of the report."""
        return self.root / "pictures"

    def write_recipe(self, name: str, flags: dict[str, Any]) -> str:
        """Write flags as a recipe file, which `metamorph train --config` can run again; returns its path."""
        path = self.root / "recipes" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        plain = {key: str(value) if isinstance(value, Path) else value for key, value in flags.items()}
        path.write_text(yaml.safe_dump(plain, sort_keys=False), encoding="utf-8")
        return str(path)


def train_connector(space: Workspace, files: WorldFiles, recipe: Recipe) -> TrainResult:
    """Stage 1: `metamorph train --config recipes/stage1.yaml`."""
    flags = {**_model_flags(space, files), "data_path": files.stage1, "output_dir": space.connector}
    return _train(space.write_recipe("stage1", {**flags, **recipe.stage1_flags()}), "stage 1")


def train_model(space: Workspace, files: WorldFiles, recipe: Recipe) -> TrainResult:
    """Stage 2: `metamorph train --config recipes/stage2.yaml`."""
    flags = {
        **_model_flags(space, files),
        "pretrain_mm_mlp_adapter": space.connector,
        "data_path": files.stage2,
        "output_dir": space.model,
    }
    return _train(space.write_recipe("stage2", {**flags, **recipe.stage2_flags()}), "stage 2")


def fit_visualizer(space: Workspace, files: WorldFiles, recipe: Recipe) -> VisualizerResult:
    """The visualizer: `metamorph train-visualizer --config recipes/visualizer.yaml`.

    The recipe first aligns the projector with the conditions that mini-sd itself has for the pictures.
    """
    flags = {
        "pretrained_model_name_or_path": str(space.assets["mini-sd"]),
        "vision_tower": str(space.assets["mini-siglip"]),
        "image_folder": str(files.visualizer_folder),
        "alignment_conditions": str(
            write_conditions(files.visualizer_folder, space.assets["mini-sd"], space.conditions)
        ),
        "output_dir": str(space.visualizer),
        "seed": space.seed,
        **recipe.visualizer_flags(),
    }
    path = space.write_recipe("visualizer", flags)
    (args,) = parse_arguments((VisualizerArguments,), ["--config", path], prog="metamorph train-visualizer")
    return train_visualizer(args, callbacks=[ShowProgress("visualizer", log_entries=False)])


def _model_flags(space: Workspace, files: WorldFiles) -> dict[str, Any]:
    return {
        "model_name_or_path": space.assets["mini-llama"],
        "vision_tower": space.assets["mini-siglip"],
        "image_folder": files.image_folder,
        "seed": space.seed,
    }


def _train(path: str, title: str) -> TrainResult:
    types = (ModelArguments, DataArguments, MetaMorphTrainingArguments)
    model, data, training = parse_arguments(types, ["--config", path])
    return run_training(model, data, training, callbacks=[ShowProgress(title, log_entries=False, shown=BESIDE_BAR)])
