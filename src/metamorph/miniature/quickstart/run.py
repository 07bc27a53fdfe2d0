"""The whole system in miniature, from data to a report: `metamorph quickstart` is this module with flags."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from metamorph.inference import SamplerSettings, load
from metamorph.mini.cards import library_versions
from metamorph.miniature.quickstart.clock import StageClock
from metamorph.miniature.quickstart.evaluate import WorldEvaluation, evaluate_world, seen_color
from metamorph.miniature.quickstart.options import METRICS_FILE, QuickstartOptions, clear_output, thread_count
from metamorph.miniature.quickstart.recipe import FAST, FULL, Recipe
from metamorph.miniature.quickstart.report import LossCurves, write_report
from metamorph.miniature.quickstart.stages import Workspace, fit_visualizer, train_connector, train_model
from metamorph.miniature.world.dataset import WorldFiles, write_dataset


logger = logging.getLogger(__name__)

FLOORS = {"vqa": 0.70, "image_start": 0.98, "seen_color": 0.60}
"""What a full run must reach: exact answers, `<image_start>` when and only when asked for, colours of drawings."""


@dataclass(frozen=True)
class QuickstartResult:
    """What a run leaves."""

    metrics: dict[str, Any]
    """Content of metrics.json."""
    report: Path
    """The HTML report."""


def run_quickstart(options: QuickstartOptions) -> QuickstartResult:
    """Make data, train both stages and the visualizer, evaluate on unseen scenes, and report.

    Args:
        options: Where, with which seed, and how long.
    """
    recipe, clock = FAST if options.fast else FULL, StageClock()
    space = Workspace(options.output_dir, options.assets, options.seed)
    clear_output(space.root)
    _quiet_libraries()
    torch.set_num_threads(thread_count())

    with clock.stage("data", "writing the miniature world"):
        files = write_dataset(space.data, seed=options.seed, sizes=recipe.world_sizes)
    with clock.stage("stage1", f"stage 1: connector, {recipe.stage1_steps} steps"):
        stage1 = train_connector(space, files, recipe)
    with clock.stage("stage2", f"stage 2: language model, {recipe.stage2_steps} steps"):
        stage2 = train_model(space, files, recipe)
    with clock.stage("visualizer", f"visualizer: {recipe.visualizer_steps} steps"):
        visualizer = fit_visualizer(space, files, recipe)
    with clock.stage("evaluation", "evaluation on unseen scenes"):
        evaluation = evaluate_folders(space, files, recipe)

    metrics = collect_metrics(options, recipe, evaluation, clock)
    curves = LossCurves(stage1.log_history, stage2.log_history, visualizer.losses)
    report = write_report(space, evaluation, curves, metrics)
    (space.root / METRICS_FILE).write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    return QuickstartResult(metrics, report)


def evaluate_folders(space: Workspace, files: WorldFiles, recipe: Recipe) -> WorldEvaluation:
    """Evaluate the folders that training left, loaded as a user would load them."""
    session = load(space.model, space.visualizer, device="cpu", dtype=torch.float32)
    settings = SamplerSettings(recipe.guidance_scale, recipe.sampling_steps, seed=space.seed)
    return evaluate_world(session.model, session.processor, session.visualizer, files, recipe.evaluation, settings)


def collect_metrics(
    options: QuickstartOptions, recipe: Recipe, evaluation: WorldEvaluation, clock: StageClock
) -> dict[str, Any]:
    """The content of metrics.json; every accuracy is a fraction between 0 and 1."""
    metrics = evaluation.metrics()
    reached = {
        "vqa": metrics["vqa"]["accuracy"],
        "image_start": metrics["image_start"]["accuracy"],
        "seen_color": seen_color(metrics["generation"]),
    }
    floors = {
        name: {"floor": floor, "value": reached[name], "reached": reached[name] >= floor}
        for name, floor in FLOORS.items()
    }
    return {
        **metrics,
        # A fast run learns nothing, so floors would only confuse.
        "floors": {} if options.fast else floors,
        "seconds": {**clock.seconds, "total": clock.total},
        "cpu_seconds": clock.cpu_seconds,
        "peak_rss_mb": clock.largest_peak_rss_mb,
        "peak_rss_mb_per_stage": clock.peak_rss_mb,
        "seed": options.seed,
        "fast": options.fast,
        "threads": torch.get_num_threads(),
        "recipe": asdict(recipe),
        "versions": {**library_versions(), "diffusers": diffusers.__version__},
    }


def _quiet_libraries() -> None:
    """Leave the terminal to the quickstart's own bars: no bars for loading weights, errors only."""
    for library in (transformers.utils.logging, diffusers.utils.logging):
        library.disable_progress_bar()
        library.set_verbosity_error()
