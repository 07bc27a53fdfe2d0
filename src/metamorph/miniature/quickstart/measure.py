"""How good a finished model and its visualizer are in the miniature world: `metamorph evaluate world` with flags."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from metamorph.inference import SamplerSettings, load
from metamorph.miniature.quickstart.evaluate import WorldEvaluation, evaluate_world
from metamorph.miniature.quickstart.figures import drawing_cell, save_accuracies, save_grid
from metamorph.miniature.quickstart.recipe import MINI, MINI_EVALUATION_SEED, EvaluationSizes
from metamorph.miniature.quickstart.report import CARDS_PER_SECTION, make_sections
from metamorph.miniature.world.dataset import WorldSizes, write_dataset


GRID = {"seen": 24, "pairs": 24, "held_out": 8, "knowledge": 8}
"""Drawings of the grid of 64: the first ones of each group, not chosen."""


@dataclass(frozen=True)
class Measured:
    """What an evaluation found."""

    evaluation: WorldEvaluation
    """Every question and drawing."""
    metrics: dict[str, Any]
    """Content of metrics.json."""


def measure_world(
    model: str | Path,
    visualizer: str | Path,
    output_dir: Path,
    *,
    seed: int = MINI_EVALUATION_SEED,
    sizes: EvaluationSizes = MINI.evaluation,
) -> Measured:
    """Ask and let draw on unseen scenes, and write metrics.json and grids of pictures.

    Args:
        model: Folder of a MetaMorph model that was trained on the miniature world.
        visualizer: Folder of its visualizer.
        output_dir: Gets `data`, `pictures` and metrics.json.
        seed: Of scenes, words and the visualizer's noise.
        sizes: How many records of each kind.
    """
    files = write_dataset(output_dir / "data", seed=seed, sizes=WorldSizes.only_evaluation(sizes.largest))
    session = load(model, visualizer, device="cpu", dtype=torch.float32)
    settings = SamplerSettings(MINI.guidance_scale, MINI.sampling_steps, seed=seed)
    evaluation = evaluate_world(session.model, session.processor, session.visualizer, files, sizes, settings)
    metrics = {**evaluation.metrics(), "seed": seed}
    (output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    write_grids(output_dir / "pictures", evaluation, metrics)
    return Measured(evaluation, metrics)


def write_grids(folder: Path, evaluation: WorldEvaluation, metrics: dict[str, Any]) -> None:
    """Write `grid.png`, 64 drawings as `GRID` says, and a grid of every kind of task.

    Args:
        folder: Where to write; created if missing.
        evaluation: What was drawn.
        metrics: What `evaluation.metrics()` gives.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawings = [item for group, count in GRID.items() for item in evaluation.drawings[group][:count]]
    right = sum(item.is_right() for item in drawings)
    title = f"The first drawings of every kind: {right} of {len(drawings)} right in everything"
    save_grid(folder / "grid.png", title, [drawing_cell(item) for item in drawings])
    for section in make_sections(evaluation, metrics):
        save_grid(folder / f"{section.name}.png", section.title, section.cells[:CARDS_PER_SECTION])
    save_accuracies(folder / "vqa_types.png", metrics["vqa"]["per_type"])
