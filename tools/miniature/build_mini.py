"""Builds mini: the finished miniature, a MetaMorph model and its visualizer, trained longer than the quickstart.

The stages of the quickstart train it from the three other assets, with the recipe `MINI`. When the build is repeated,
finished stages are skipped, and stage 2 resumes from its last checkpoint.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import diffusers
import torch

from metamorph.mini import PARTS, AssetError, asset_path
from metamorph.miniature.quickstart.clock import StageClock
from metamorph.miniature.quickstart.measure import measure_world
from metamorph.miniature.quickstart.recipe import MINI, Recipe
from metamorph.miniature.quickstart.stages import fit_visualizer, train_connector, train_model
from metamorph.miniature.quickstart.workspace import Workspace
from metamorph.miniature.world.dataset import write_dataset
from metamorph.models.modeling_metamorph import MetaMorphForConditionalGeneration
from metamorph.models.processing_metamorph import MetaMorphProcessor
from metamorph.visualization.pipeline import VisualizationPipeline
from tools.miniature.cards import AssetCard, library_versions, write_card


logger = logging.getLogger(__name__)

NAME = "mini"
GATES = {
    "vqa.all": 0.95,
    "vqa.each_type": 0.90,
    "image_start": 0.98,
    "seen": 0.90,
    "held_out": 0.60,
    "pairs": 0.70,
    "edit": 0.80,
    "next_frame": 0.80,
    "knowledge": 0.60,
    "visualizer.singles": 0.95,
    "visualizer.pairs": 0.85,
}
"""Least shares of exact answers, and of drawings that the checker reads right in everything, on unseen scenes."""

_DONE_FILE = "done.json"


def build(
    output_dir: Path,
    *,
    seed: int = 0,
    resume: bool = True,
    recipe: Recipe = MINI,
    work_dir: Path | None = None,
    assets: dict[str, Path] | None = None,
    enforce_gates: bool = True,
) -> dict[str, Any]:
    """Train, judge and write mini.

    Args:
        output_dir: Folder of the finished asset, with the subfolders `model` and `visualizer`; written only when the
            gates are passed.
        seed: Seed of weights and data.
        resume: Whether to continue an interrupted build.
        recipe: Sizes and hyper-parameters, the shipped ones by default.
        work_dir: Folder of the unfinished build, by default `<output_dir>.building`; removed at the end.
        assets: Folders of mini-siglip, mini-llama and mini-sd; by default those next to `output_dir`, else the
            shipped ones.
        enforce_gates: Whether figures below the gates are an error.

    Returns:
        The figures of the card.

    Raises:
        AssetError: A gate is not reached.
    """
    work_dir = work_dir or output_dir.with_name(output_dir.name + ".building")
    if not resume:
        shutil.rmtree(work_dir, ignore_errors=True)
    space = Workspace(work_dir, assets or _parts_next_to(output_dir), seed)
    seconds = _train_stages(space, recipe)
    finished = work_dir / "finished"
    write_weights(space, finished)
    # The figures are those of the rounded weights, not of the ones in memory.
    metrics = measure_world(finished / "model", finished / "visualizer", work_dir / "evaluation", recipe=recipe)
    figures = summarise_figures(metrics)
    logger.info("%s: %s", NAME, figures)
    if enforce_gates and (missed := missed_gates(figures)):
        raise AssetError(f"{NAME} is below its gates {GATES}: {missed}. Train longer, or try another seed.")
    write_card(finished, _card(seed, seconds, recipe, figures))
    shutil.rmtree(output_dir, ignore_errors=True)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(finished, output_dir)
    shutil.rmtree(work_dir)
    return figures


def _parts_next_to(output_dir: Path) -> dict[str, Path]:
    """The parts next to `output_dir` (built by the same command), else the shipped ones."""
    built = {name: output_dir.parent / name for name in PARTS}
    return {name: path if path.is_dir() else asset_path(name) for name, path in built.items()}


def summarise_figures(metrics: dict[str, Any]) -> dict[str, Any]:
    """The figures of the card, by names as in `GATES`.

    Args:
        metrics: What `WorldEvaluation.metrics` gives.
    """
    drawn = metrics["generation"]
    return {
        "vqa": {"all": metrics["vqa"]["accuracy"], **metrics["vqa"]["per_type"]},
        "image_start": metrics["image_start"]["accuracy"],
        **{group: drawn[group]["all"] for group in ("seen", "held_out", "pairs", "knowledge")},
        "edit": metrics["edit"]["all"],
        "next_frame": metrics["next_frame"]["all"],
        "visualizer": {group: metrics["visualizer"][group]["all"] for group in ("singles", "pairs")},
        "n": {
            "vqa": metrics["vqa"]["n"],
            **{group: drawn[group]["n"] for group in ("seen", "held_out", "pairs", "knowledge")},
            "edit": metrics["edit"]["n"],
            "next_frame": metrics["next_frame"]["n"],
            **{f"visualizer.{group}": metrics["visualizer"][group]["n"] for group in ("singles", "pairs")},
        },
    }


def missed_gates(figures: dict[str, Any]) -> dict[str, float]:
    """The figures that are below their gates, by name."""
    reached = {name: value for name, value in figures.items() if isinstance(value, float)}
    reached |= {f"visualizer.{name}": value for name, value in figures["visualizer"].items()}
    missed = {name: value for name, value in reached.items() if value < GATES[name]}
    for kind, value in figures["vqa"].items():
        if value < GATES["vqa.all" if kind == "all" else "vqa.each_type"]:
            missed[f"vqa.{kind}"] = value
    return missed


def write_weights(space: Workspace, folder: Path) -> None:
    """Write model and visualizer to `folder` in bfloat16; what is there is replaced."""
    shutil.rmtree(folder, ignore_errors=True)
    model = MetaMorphForConditionalGeneration.from_pretrained(space.model, dtype=torch.bfloat16)
    model.save_pretrained(folder / "model")
    MetaMorphProcessor.from_pretrained(space.model).save_pretrained(folder / "model")
    pipeline = VisualizationPipeline.from_pretrained(space.visualizer).to(torch.bfloat16)
    pipeline.save_pretrained(folder / "visualizer")


def _train_stages(space: Workspace, recipe: Recipe) -> float:
    """Run the stages that are not finished yet, or were with other settings; returns the seconds of all of them."""
    files = write_dataset(space.data, seed=space.seed, sizes=replace(recipe.world_sizes, evaluation=0))
    first, second, visualizer = recipe.stage1_flags(), recipe.stage2_flags(), recipe.visualizer_flags()
    stages: dict[str, tuple[Path, dict[str, Any], Callable[[], Any]]] = {
        "stage 1": (space.connector, first, lambda: train_connector(space, files, recipe)),
        "stage 2": (space.model, {"stage 1": first, **second}, lambda: train_model(space, files, recipe)),
        "visualizer": (space.visualizer, visualizer, lambda: fit_visualizer(space, files, recipe)),
    }
    seconds, clock = 0.0, StageClock()
    for name, (folder, flags, train) in stages.items():
        done, identity = folder / _DONE_FILE, f"seed {space.seed} {recipe.sizes} {flags}"
        facts = json.loads(done.read_text(encoding="utf-8")) if done.is_file() else {}
        if facts.get("identity") != identity:
            with clock.stage(name, f"{NAME}: {name}"):
                train()
            facts = {"identity": identity, "seconds": clock.seconds[name]}
            done.write_text(json.dumps(facts) + "\n", encoding="utf-8")
        seconds += facts["seconds"]
    return seconds


def _card(seed: int, seconds: float, recipe: Recipe, figures: dict[str, Any]) -> AssetCard:
    missed = missed_gates(figures)
    verdict = f" It misses these gates: {', '.join(missed)}." if missed else " It passes all its gates."
    return AssetCard(
        name=NAME,
        summary=(
            "A trained MetaMorph: `model`, built from mini-siglip and mini-llama, and `visualizer`, mini-sd with a "
            "projector for the model's visual tokens. Both were trained by the stages of the quickstart, for "
            "longer. An answer counts as right if it is exact; an image, if the pixel checker finds the right "
            "objects with the right colours, shapes, sizes and positions and nothing else. The figures are for "
            "scenes that were never trained on, with the bf16 weights of this folder." + verdict
        ),
        build_command="python -m tools.miniature.rebuild mini",
        seed=seed,
        seconds=seconds,
        recipe=asdict(recipe),
        figures=figures,
        gates=dict(GATES),
        versions={**library_versions(), "diffusers": diffusers.__version__},
    )
