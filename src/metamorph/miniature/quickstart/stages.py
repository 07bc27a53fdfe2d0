"""The stages of the quickstart that train: each writes a recipe file and runs it like the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from metamorph.flags.recipes import parse_arguments
from metamorph.miniature.quickstart.conditions import fit_projector
from metamorph.miniature.quickstart.recipe import Recipe
from metamorph.miniature.quickstart.workspace import Workspace
from metamorph.miniature.world.dataset import WorldFiles
from metamorph.training.arguments import DataArguments, MetaMorphTrainingArguments, ModelArguments
from metamorph.training.reporting.progress import ShowProgress
from metamorph.training.run import TrainResult, run_training
from metamorph.visualizer_training.arguments import VisualizerArguments
from metamorph.visualizer_training.run import VisualizerResult, train_visualizer


BESIDE_BAR = {"text_loss": "text", "visual_loss": "visual", "visual_cosine": "cosine"}


def train_connector(space: Workspace, files: WorldFiles, recipe: Recipe) -> TrainResult:
    """Stage 1: `metamorph train --config recipes/stage1.yaml`."""
    flags = {"data_path": files.stage1, "output_dir": space.connector, **recipe.stage1_flags()}
    return _train(space, files, "stage1", flags)


def train_model(space: Workspace, files: WorldFiles, recipe: Recipe) -> TrainResult:
    """Stage 2: `metamorph train --config recipes/stage2.yaml`."""
    flags = {"pretrain_mm_mlp_adapter": space.connector, "data_path": files.stage2, "output_dir": space.model}
    return _train(space, files, "stage2", {**flags, **recipe.stage2_flags()})


def fit_visualizer(space: Workspace, files: WorldFiles, recipe: Recipe) -> VisualizerResult:
    """The visualizer: `metamorph train-visualizer --config recipes/visualizer.yaml`, from an aligned projector."""
    flags = {
        "pretrained_model_name_or_path": space.assets["mini-sd"],
        "vision_tower": space.assets["mini-siglip"],
        "image_folder": files.visualizer_folder,
        "pretrained_projector": space.data / "projector",
        "output_dir": space.visualizer,
        "seed": space.seed,
        **recipe.visualizer_flags(),
    }
    words = ["--config", _write_recipe(space, "visualizer", flags)]
    (args,) = parse_arguments((VisualizerArguments,), words, prog="metamorph train-visualizer")
    fit_projector(args, recipe.alignment_steps)
    return train_visualizer(args, callbacks=[ShowProgress("visualizer", log_entries=False)])


def _train(space: Workspace, files: WorldFiles, name: str, flags: dict[str, Any]) -> TrainResult:
    shared = {
        "model_name_or_path": space.assets["mini-llama"],
        "vision_tower": space.assets["mini-siglip"],
        "image_folder": files.image_folder,
        "seed": space.seed,
    }
    types = (ModelArguments, DataArguments, MetaMorphTrainingArguments)
    model, data, training = parse_arguments(types, ["--config", _write_recipe(space, name, {**shared, **flags})])
    bar = ShowProgress(name.replace("stage", "stage "), log_entries=False, shown=BESIDE_BAR)
    return run_training(model, data, training, callbacks=[bar])


def _write_recipe(space: Workspace, name: str, flags: dict[str, Any]) -> str:
    """Write flags as a recipe file, which `metamorph train --config` can run again; returns its path."""
    path = space.root / "recipes" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in flags.items()}
    path.write_text(yaml.safe_dump(plain, sort_keys=False), encoding="utf-8")
    return str(path)
