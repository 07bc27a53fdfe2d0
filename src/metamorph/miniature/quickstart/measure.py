"""Measures a trained model and its visualizer in the miniature world: `metamorph evaluate world`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from metamorph.miniature.quickstart.evaluate import evaluate_world
from metamorph.miniature.quickstart.figures import drawing_cell, save_grid
from metamorph.miniature.quickstart.recipe import MINI, MINI_EVALUATION_SEED, Recipe
from metamorph.miniature.quickstart.report import save_sections
from metamorph.miniature.world.dataset import WorldSizes, write_dataset


GRID = {"seen": 24, "pairs": 24, "held_out": 8, "knowledge": 8}
"""Number of drawings of each group in the grid of 64: the first ones, not hand-picked."""


def measure_world(
    model: str | Path,
    visualizer: str | Path,
    output_dir: Path,
    *,
    seed: int = MINI_EVALUATION_SEED,
    recipe: Recipe = MINI,
) -> dict[str, Any]:
    """Evaluate a trained model on unseen scenes; returns the metrics, and writes them and grids of images.

    `seed` decides scenes, words and noise, `recipe` the number of records and the sampler.
    """
    sizes = WorldSizes(evaluation=recipe.evaluation.largest)
    files = write_dataset(output_dir / "data", seed=seed, sizes=sizes)
    evaluation = evaluate_world(model, visualizer, files, recipe, seed)
    metrics = {**evaluation.metrics(), "seed": seed}
    (output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    save_sections(output_dir / "pictures", evaluation, metrics)
    drawings = [item for group, count in GRID.items() for item in evaluation.drawings[group][:count]]
    right = sum(item.is_right() for item in drawings)
    title = f"The first drawings of each kind: {right} of {len(drawings)} completely right"
    save_grid(output_dir / "pictures" / "grid.png", title, [drawing_cell(item) for item in drawings])
    return metrics
