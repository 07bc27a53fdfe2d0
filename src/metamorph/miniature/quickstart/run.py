"""The full quickstart, from data to a report: `metamorph quickstart` is this module with flags."""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import diffusers
import torch
import transformers

from metamorph.miniature.quickstart.clock import StageClock
from metamorph.miniature.quickstart.evaluate import evaluate_world, seen_color
from metamorph.miniature.quickstart.figures import save_curves
from metamorph.miniature.quickstart.recipe import FAST, FULL
from metamorph.miniature.quickstart.report import write_report
from metamorph.miniature.quickstart.stages import fit_visualizer, train_connector, train_model
from metamorph.miniature.quickstart.workspace import METRICS_FILE, Workspace, thread_count
from metamorph.miniature.world.dataset import write_dataset


FLOORS = {"vqa": 0.70, "image_start": 0.98, "seen_color": 0.60}
"""What a full run must reach: exact answers, `<image_start>` if and only if asked for, colours of drawings."""


def run_quickstart(space: Workspace, *, fast: bool = False) -> dict[str, Any]:
    """Write data, train both stages and the visualizer, evaluate on unseen scenes, report, and return the metrics.

    With `fast`, every part runs for a few steps only, to see that it works; nothing is learned.
    """
    recipe, clock = FAST if fast else FULL, StageClock()
    space.clear()
    for library in (transformers.utils.logging, diffusers.utils.logging):  # the quickstart has its own bars
        library.disable_progress_bar()
        library.set_verbosity_error()
    torch.set_num_threads(thread_count())

    with clock.stage("data", "writing the miniature world"):
        files = write_dataset(space.data, seed=space.seed, sizes=recipe.world_sizes)
    with clock.stage("stage1", f"stage 1: connector, {recipe.stage1_steps} steps"):
        stage1 = train_connector(space, files, recipe)
    with clock.stage("stage2", f"stage 2: language model, {recipe.stage2_steps} steps"):
        stage2 = train_model(space, files, recipe)
    with clock.stage("visualizer", f"visualizer: {recipe.visualizer_steps} steps"):
        visualizer = fit_visualizer(space, files, recipe)
    with clock.stage("evaluation", "evaluation on unseen scenes"):
        evaluation = evaluate_world(space.model, space.visualizer, files, recipe, space.seed)

    metrics = evaluation.metrics()
    metrics |= {
        "floors": {} if fast else _floors(metrics),  # a fast run learns nothing
        "seconds": {**clock.seconds, "total": clock.total},
        "cpu_seconds": clock.cpu_seconds,
        "peak_rss_mb": max(clock.peak_rss_mb.values()),
        "peak_rss_mb_per_stage": clock.peak_rss_mb,
        "seed": space.seed,
        "fast": fast,
        "threads": torch.get_num_threads(),
        "recipe": asdict(recipe),
        "versions": {name: version(name) for name in ("torch", "transformers", "numpy", "diffusers")},
    }
    space.figures.mkdir()
    save_curves(space.figures / "losses.png", stage1.log_history, stage2.log_history, visualizer.losses)
    write_report(space, evaluation, metrics)
    (space.root / METRICS_FILE).write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    return metrics


def _floors(metrics: dict[str, Any]) -> dict[str, dict[str, Any]]:
    reached = {
        "vqa": metrics["vqa"]["accuracy"],
        "image_start": metrics["image_start"]["accuracy"],
        "seen_color": seen_color(metrics["generation"]),
    }
    return {
        name: {"floor": floor, "value": reached[name], "reached": reached[name] >= floor}
        for name, floor in FLOORS.items()
    }
