"""Does learning to understand images help drawing them? The paper's core comparison in miniature.

`joint-vs-generation-only` trains the same model several times on the same drawing records and for the same number of
optimizer steps: once on these records alone, once with an equal number of visual questions added to every batch. Each
model then draws unseen scenes, of colour-shape pairs that training drew and of pairs that it never drew. This is the
comparison of section 4.2 of the MetaMorph paper (arXiv 2412.14164), where joint training wins, at a scale a million
times smaller.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metamorph.evaluation.drawings import summarise
from metamorph.inference import SamplerSettings
from metamorph.mini import PARTS, asset_path
from metamorph.miniature.quickstart.evaluate import VERDICTS, compare_tokens, draw_groups, drawing_tasks, load_session
from metamorph.miniature.quickstart.figures import save_study
from metamorph.miniature.quickstart.recipe import FULL, EvaluationSizes, Recipe
from metamorph.miniature.quickstart.stages import train_connector, train_model
from metamorph.miniature.quickstart.workspace import Workspace, thread_count
from metamorph.miniature.world.dataset import WorldFiles, WorldSizes, write_dataset


logger = logging.getLogger(__name__)

JOINT, GENERATION_ONLY = "joint", "generation only"
CONDITIONS = (GENERATION_ONLY, JOINT)
GROUPS = ("seen", "held_out")
"""Groups of drawing tasks that are compared."""
RUNS_FILE, RESULT_FILE, PLOT_FILE = "runs.jsonl", "study.json", "study.png"


@dataclass(frozen=True)
class StudySettings:
    """The size of a study: the flags of `metamorph study`."""

    output_dir: Path
    """Receives runs.jsonl, study.json and study.png. An interrupted study continues here."""
    seeds: int = 3
    """Repetitions, each with its own data, connector and order of records."""
    budgets: tuple[int, ...] = (1000, 2000, 4000)
    """Numbers of drawing records that are compared."""
    passes: int = 1
    """Epochs."""
    generation_per_step: int = 16
    """Drawing records per batch; joint training adds an equal number of questions about images."""
    drawings: int = 64
    """Drawings per model and group that are judged."""

    def __post_init__(self) -> None:
        if min(self.budgets) < self.generation_per_step:
            raise ValueError(
                f"--budgets {' '.join(map(str, self.budgets))}: give numbers of drawing records, each at least "
                f"--generation-per-step {self.generation_per_step}"
            )

    @property
    def evaluation(self) -> EvaluationSizes:
        """Number of evaluated records; only some of those for `seen` have one object, so more of them are read."""
        return EvaluationSizes(
            vqa=0, seen=2 * self.drawings, held_out=self.drawings, knowledge=0, edit=0, next_frame=0, visualizer=0
        )


def run_study(settings: StudySettings, recipe: Recipe = FULL) -> dict[str, Any]:
    """Train and evaluate every model that is not in runs.jsonl yet, and write the plot and the result.

    `recipe` decides everything that is not compared. Returns the content of study.json: `plan` (the settings), `runs`
    (one per model) and `summary`.
    """
    torch.set_num_threads(thread_count())
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    runs = _finished_runs(settings)
    done = {(run["seed"], run["budget"], run["condition"]) for run in runs}
    for seed in range(settings.seeds):
        if missing := [each for each in product(settings.budgets, CONDITIONS) if (seed, *each) not in done]:
            runs += _run_seed(settings, recipe, seed, missing)
    runs = [run for run in runs if run["seed"] < settings.seeds and run["budget"] in settings.budgets]
    summary = summarise_runs(runs)
    plan = {name: value for name, value in vars(settings).items() if name != "output_dir"}
    result = {"plan": plan, "runs": runs, "summary": summary}
    (settings.output_dir / RESULT_FILE).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    save_study(settings.output_dir / PLOT_FILE, summary)
    return result


def summarise_runs(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row with mean and standard error over seeds (0 for one seed) for each group, condition and budget."""
    rows = []
    for group, condition, budget in product(GROUPS, CONDITIONS, sorted({run["budget"] for run in runs})):
        found = [run[group] for run in runs if (run["condition"], run["budget"]) == (condition, budget)]
        if not found:
            continue
        shares = [figures["all"] for figures in found]
        deviation = np.std(shares, ddof=1) if len(shares) > 1 else 0.0
        figures = {
            "mean": np.mean(shares),
            "standard_error": deviation / math.sqrt(len(shares)),
            "cosine": np.mean([figures["cosine"] for figures in found]),
        }
        rounded = {name: round(float(value), 4) for name, value in figures.items()}
        rows.append({"group": group, "condition": condition, "budget": budget, "n": len(found), **rounded})
    return rows


def study_recipe(settings: StudySettings, recipe: Recipe, budget: int, condition: str) -> Recipe:
    """`recipe` with the study's batch size and number of steps, which is the same for both conditions."""
    batch = settings.generation_per_step * (2 if condition == JOINT else 1)
    steps = math.ceil(settings.passes * budget / settings.generation_per_step)
    return replace(recipe, batch_size=batch, stage2_steps=steps)


def _run_seed(
    settings: StudySettings, recipe: Recipe, seed: int, wanted: Sequence[tuple[int, str]]
) -> list[dict[str, Any]]:
    """Train and evaluate the models of one seed, by budget and condition; each is written to runs.jsonl at once."""
    space = Workspace(settings.output_dir / f"seed-{seed}", {name: asset_path(name) for name in PARTS}, seed)
    most = max(settings.budgets)
    sizes = WorldSizes(
        captions=recipe.sizes.captions, vqa=most, text_to_image=most, evaluation=settings.evaluation.largest
    )
    files = write_dataset(space.data, seed=seed, sizes=sizes)
    if not (space.connector / "mm_projector.safetensors").is_file():
        train_connector(space, files, recipe)
    records: dict[str, list[str]] = {"text_to_image": [], "vqa": []}
    for line in files.stage2.read_text(encoding="utf-8").splitlines():
        records[json.loads(line)["task"]].append(line)
    finished = []
    for budget, condition in wanted:
        lines = records["text_to_image"][:budget] + (records["vqa"][:budget] if condition == JOINT else [])
        data = space.data / "study.jsonl"
        data.write_text("\n".join(lines) + "\n", encoding="utf-8")
        shutil.rmtree(space.model, ignore_errors=True)  # else the next run would resume this one
        changed = study_recipe(settings, recipe, budget, condition)
        logger.info("seed %d, %d drawing records, %s, %d steps", seed, budget, condition, changed.stage2_steps)
        figures = _run_one(settings, changed, space, replace(files, stage2=data))
        run = {"seed": seed, "budget": budget, "condition": condition, **figures}
        with (settings.output_dir / RUNS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(run) + "\n")
        finished.append(run)
    shutil.rmtree(space.root)
    return finished


def _run_one(settings: StudySettings, recipe: Recipe, space: Workspace, files: WorldFiles) -> dict[str, Any]:
    result = train_model(space, files, recipe)
    session = load_session(space.model, asset_path("mini") / "visualizer")
    tasks = drawing_tasks(files, settings.evaluation)
    chosen = {group: tasks[group][: settings.drawings] for group in GROUPS}
    drawings = draw_groups(session, chosen, SamplerSettings(recipe.guidance_scale, recipe.sampling_steps, space.seed))
    tokens = compare_tokens(session, drawings)
    losses = [line["visual_loss"] for line in result.log_history if "visual_loss" in line]
    return {
        "steps": recipe.stage2_steps,
        "visual_loss": losses[-1] if losses else None,  # the run may be shorter than a logging interval
        "seconds": round(result.metrics["train_runtime"], 1),
        **{group: {**summarise(drawings[group], VERDICTS), **tokens[group]} for group in GROUPS},
    }


def _finished_runs(settings: StudySettings) -> list[dict[str, Any]]:
    """Runs of an interrupted study with the same settings, except that seeds and budgets may be added."""
    file = settings.output_dir / "plan.json"
    wanted = {name: getattr(settings, name) for name in ("passes", "generation_per_step", "drawings")}
    if file.is_file():
        found = json.loads(file.read_text(encoding="utf-8"))
        if found != wanted:
            raise ValueError(
                f"--output-dir {settings.output_dir} holds a study with other settings, {found}; give another folder"
            )
    file.write_text(json.dumps(wanted) + "\n", encoding="utf-8")
    path = settings.output_dir / RUNS_FILE
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
