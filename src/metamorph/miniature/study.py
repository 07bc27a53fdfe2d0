"""Does learning to understand images help drawing them, and the other way round? Section 4 of the paper in miniature.

A study trains the same model on several mixtures of drawing records and questions about images. Each model draws unseen
scenes, of colour-shape pairs that training drew and of pairs that it never drew, and answers questions about unseen
images. There are two studies:

- `joint-vs-generation-only`: drawing records alone, or with an equal number of questions in the same number of steps;
- `data-grid`: every number of questions with every number of drawing records, each seen once, in equally many steps.

The MetaMorph paper (arXiv 2412.14164) compares the same at a scale a million times larger.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metamorph.evaluation.drawings import Drawing, DrawingTask, summarise
from metamorph.evaluation.questions import summarise_answers
from metamorph.inference import SamplerSettings
from metamorph.mini import PARTS, asset_path
from metamorph.miniature.quickstart.evaluate import (
    VERDICTS,
    ask_questions,
    compare_tokens,
    draw_groups,
    drawing_tasks,
    load_session,
)
from metamorph.miniature.quickstart.figures import save_study_curves, save_study_maps
from metamorph.miniature.quickstart.recipe import FULL, EvaluationSizes, Recipe
from metamorph.miniature.quickstart.stages import train_connector, train_model
from metamorph.miniature.quickstart.workspace import Workspace, thread_count
from metamorph.miniature.world.dataset import WorldFiles, WorldSizes, write_dataset
from metamorph.miniature.world.worlds import WORLDS


logger = logging.getLogger(__name__)

JOINT, GENERATION_ONLY = "joint", "generation only"
GROUPS = ("seen", "held_out")
"""Groups of drawing tasks that are compared."""
RUNS_FILE = "runs.jsonl"
STUDY = replace(FULL, sampling_steps=8)
"""The quickstart's recipe with fewer denoising steps, with which mini's visualizer draws true tokens as well."""


@dataclass(frozen=True)
class Mixture:
    """A model to train: how much data of each kind, and how."""

    condition: str
    """Name of the curve that it belongs to."""
    questions: int
    """Images with up to three questions each."""
    drawings: int
    """Drawing records."""
    batch_size: int
    """Records of both kinds in a step."""
    passes: int = 1
    """Epochs."""

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return math.ceil(self.passes * (self.questions + self.drawings) / self.batch_size)

    @property
    def key(self) -> dict[str, int]:
        """What tells its run from those of other mixtures, in any study."""
        return {
            "questions": self.questions,
            "drawings": self.drawings,
            "batch_size": self.batch_size,
            "steps": self.steps,
        }


def joint_mixtures(budgets: Sequence[int], generation_per_step: int = 16, passes: int = 1) -> tuple[Mixture, ...]:
    """Drawing records alone and with as many questions, in the same number of steps with equally many drawings each."""
    if min(budgets) < generation_per_step:
        raise ValueError(
            f"--budgets {' '.join(map(str, budgets))}: give numbers of drawing records, each at least "
            f"--generation-per-step {generation_per_step}"
        )
    return tuple(
        mixture
        for budget in budgets
        for mixture in (
            Mixture(GENERATION_ONLY, 0, budget, generation_per_step, passes),
            Mixture(JOINT, budget, budget, 2 * generation_per_step, passes),
        )
    )


def grid_mixtures(questions: Sequence[int], budgets: Sequence[int], steps: int = 250) -> tuple[Mixture, ...]:
    """Every number of questions with every number of drawing records, all in about the same number of steps."""
    totals = {(count, budget): count + budget for budget, count in product(budgets, questions) if count + budget}
    for (count, budget), total in totals.items():
        if total < steps:
            raise ValueError(f"{count} of --questions and {budget} of --budgets are fewer records than --steps {steps}")
    return tuple(
        Mixture(f"{count} images with questions", count, budget, math.ceil(total / steps))
        for (count, budget), total in totals.items()
    )


@dataclass(frozen=True)
class StudySettings:
    """A study: which models are trained and how they are judged."""

    output_dir: Path
    """Receives runs.jsonl, and for each study its result and plots. An interrupted study continues here."""
    name: str
    """Name of the result and the plots."""
    mixtures: tuple[Mixture, ...]
    seeds: int = 3
    """Repetitions, each with its own data, connector and order of records."""
    world: str = "basic"
    """Which of `WORLDS` the records are of."""
    judged: int = 64
    """Drawings per model and group that are judged."""
    asked: int = 200
    """Questions per model."""

    @property
    def evaluation(self) -> EvaluationSizes:
        """Number of evaluated records; only a part of those for `seen` is used, so more of them are read."""
        return EvaluationSizes(
            vqa=self.asked,
            seen=2 * self.judged,
            held_out=self.judged,
            knowledge=0,
            edit=0,
            next_frame=0,
            visualizer=0,
        )

    @property
    def plan(self) -> dict[str, Any]:
        """What the runs of a folder have in common; seeds and mixtures may be added."""
        return {"world": self.world, "judged": self.judged, "asked": self.asked}


def run_study(settings: StudySettings, recipe: Recipe = STUDY) -> dict[str, Any]:
    """Train and evaluate every model that is not in runs.jsonl yet, and write the result and the plots.

    `recipe` decides everything that is not compared. Returns the content of the result: `plan` (the settings), `runs`
    (one per model) and `summary`.
    """
    torch.set_num_threads(thread_count())
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    runs = _finished_runs(settings)
    for seed in range(settings.seeds):
        if missing := [mixture for mixture in settings.mixtures if _find(runs, seed, mixture) is None]:
            runs += _run_seed(settings, recipe, seed, missing)
    return write_result(settings, runs)


def write_result(settings: StudySettings, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Write the result and the plots of those runs that belong to the study; returns the result."""
    pairs = product(range(settings.seeds), settings.mixtures)
    found = [
        {**run, "condition": mixture.condition}
        for seed, mixture in pairs
        if (run := _find(runs, seed, mixture)) is not None
    ]
    summary = summarise_runs(found)
    result = {"study": settings.name, "plan": settings.plan, "runs": found, "summary": summary}
    stem = settings.output_dir / settings.name
    stem.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    save_study_curves(stem.with_suffix(".png"), summary)
    if settings.name == "data-grid":
        save_study_maps(settings.output_dir / f"{settings.name}-maps.png", summary)
    return result


def summarise_runs(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row with mean and standard error over seeds (0 for one seed) for each group and mixture.

    The groups are those of drawings, whose share that is right in everything counts, and `vqa`, whose share of right
    answers counts.
    """
    mixtures = dict.fromkeys((run["condition"], run["questions"], run["drawings"]) for run in runs)
    rows = []
    for group, (condition, questions, drawings) in product((*GROUPS, "vqa"), mixtures):
        same = (condition, questions, drawings)
        found = [run[group] for run in runs if (run["condition"], run["questions"], run["drawings"]) == same]
        share = "accuracy" if group == "vqa" else "all"
        shares = [figures[share] for figures in found]
        deviation = np.std(shares, ddof=1) if len(shares) > 1 else 0.0
        row = {"mean": np.mean(shares), "standard_error": deviation / math.sqrt(len(shares))}
        for name in () if group == "vqa" else ("cosine", "nearest"):
            row[name] = np.mean([figures[name] for figures in found])
        rounded = {name: round(float(value), 4) for name, value in row.items()}
        keys = {"group": group, "condition": condition, "questions": questions, "drawings": drawings}
        rows.append({**keys, "n": len(found), **rounded})
    return rows


def _run_seed(settings: StudySettings, recipe: Recipe, seed: int, mixtures: Sequence[Mixture]) -> list[dict[str, Any]]:
    """Train and evaluate the models of one seed; each is written to runs.jsonl at once."""
    space = Workspace(settings.output_dir / f"seed-{seed}", {name: asset_path(name) for name in PARTS}, seed)
    sizes = WorldSizes(
        captions=recipe.sizes.captions,
        vqa=max(mixture.questions for mixture in mixtures),
        text_to_image=max(mixture.drawings for mixture in mixtures),
        evaluation=settings.evaluation.largest,
    )
    files = write_dataset(space.data, seed=seed, sizes=sizes, world=WORLDS[settings.world])
    if not (space.connector / "mm_projector.safetensors").is_file():
        train_connector(space, files, recipe)
    records = _records_by_task(files.stage2)
    finished = []
    for mixture in mixtures:
        lines = records["text_to_image"][: mixture.drawings] + records["vqa"][: mixture.questions]
        data = space.data / "study.jsonl"
        data.write_text("\n".join(lines) + "\n", encoding="utf-8")
        shutil.rmtree(space.model, ignore_errors=True)  # else the next run would resume this one
        logger.info(
            "seed %d, %d images with questions, %d drawing records, %d steps",
            seed,
            mixture.questions,
            mixture.drawings,
            mixture.steps,
        )
        changed = replace(recipe, batch_size=mixture.batch_size, stage2_steps=mixture.steps)
        figures = _run_one(settings, changed, space, replace(files, stage2=data))
        run = {"seed": seed, **mixture.key, **figures}
        with (settings.output_dir / RUNS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(run) + "\n")
        finished.append(run)
    shutil.rmtree(space.root)
    return finished


def _records_by_task(path: Path) -> dict[str, list[str]]:
    """Lines of drawings and questions in the order of their ids: the first ones are the same in files of any size."""
    found: dict[str, list[tuple[str, str]]] = {"text_to_image": [], "vqa": []}
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        found[record["task"]].append((record["id"], line))
    return {task: [line for _, line in sorted(pairs)] for task, pairs in found.items()}


def _run_one(settings: StudySettings, recipe: Recipe, space: Workspace, files: WorldFiles) -> dict[str, Any]:
    result = train_model(space, files, recipe)
    session = load_session(space.model, asset_path("mini") / "visualizer")
    sampler = SamplerSettings(recipe.guidance_scale, recipe.sampling_steps, space.seed)
    drawings = draw_groups(session, _chosen_tasks(settings, files), sampler)
    tokens = compare_tokens(session, drawings)
    losses = [line["visual_loss"] for line in result.log_history if "visual_loss" in line]
    return {
        "visual_loss": losses[-1] if losses else None,  # the run may be shorter than a logging interval
        "seconds": round(result.metrics["train_runtime"], 1),
        **{
            group: {**summarise(items, VERDICTS), "by_objects": _by_objects(items), **tokens[group]}
            for group, items in drawings.items()
        },
        "vqa": summarise_answers(ask_questions(session, files, settings.asked)),
    }


def _chosen_tasks(settings: StudySettings, files: WorldFiles) -> dict[str, list[DrawingTask]]:
    """`settings.judged` tasks of each group; those of `seen` have one object, or in the rich world two or three."""
    tasks = drawing_tasks(files, settings.evaluation)
    pairs = tasks["pairs"][: settings.judged // 2] if settings.world == "rich" else []
    seen = pairs + tasks["seen"][: settings.judged - len(pairs)]
    return {"seen": seen, "held_out": tasks["held_out"][: settings.judged]}


def _by_objects(drawings: Iterable[Drawing]) -> dict[str, dict[str, float]]:
    """Number and share of right drawings by the number of objects."""
    found: dict[int, list[Drawing]] = {}
    for item in drawings:
        found.setdefault(len(item.task.target.objects), []).append(item)
    return {str(count): summarise(items) for count, items in sorted(found.items())}


def _find(runs: Iterable[dict[str, Any]], seed: int, mixture: Mixture) -> dict[str, Any] | None:
    wanted = {"seed": seed, **mixture.key}
    return next((run for run in runs if wanted.items() <= run.items()), None)


def _finished_runs(settings: StudySettings) -> list[dict[str, Any]]:
    """Runs of the folder, by this or another study with the same plan."""
    file = settings.output_dir / "plan.json"
    if file.is_file():
        found = json.loads(file.read_text(encoding="utf-8"))
        if found != settings.plan:
            raise ValueError(
                f"--output-dir {settings.output_dir} holds a study with other settings, {found}; give another folder"
            )
    file.write_text(json.dumps(settings.plan) + "\n", encoding="utf-8")
    path = settings.output_dir / RUNS_FILE
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
