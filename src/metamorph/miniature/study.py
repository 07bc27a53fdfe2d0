"""Does learning to understand help drawing? The paper's core comparison in miniature.

`joint-vs-generation-only` trains the same model several times with the same drawing records, in the same number of
optimizer steps: once with these records alone, once with as many visual questions added to every batch. Each model
then draws for unseen scenes, of colour-shape pairs that training drew and of pairs that it never drew. The comparison
is that of section 4.2 of the MetaMorph paper (arXiv 2412.14164), where joint training wins; what comes out here, at a
scale a million times smaller, is reported as it is.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from metamorph.evaluation.drawings import draw_tasks, summarise
from metamorph.inference.draw import SamplerSettings
from metamorph.mini import PARTS, asset_path
from metamorph.miniature.quickstart.evaluate import VERDICTS, compare_tokens, drawing_tasks, judge_scene
from metamorph.miniature.quickstart.figures import save_study
from metamorph.miniature.quickstart.options import thread_count
from metamorph.miniature.quickstart.recipe import FULL, EvaluationSizes, Recipe
from metamorph.miniature.quickstart.stages import Workspace, train_connector, train_model
from metamorph.miniature.world.dataset import WorldFiles, WorldSizes, write_dataset
from metamorph.models.modeling_metamorph import MetaMorphForConditionalGeneration
from metamorph.models.processing_metamorph import MetaMorphProcessor
from metamorph.runs.progress import Progress
from metamorph.visualization.pipeline import VisualizationPipeline


logger = logging.getLogger(__name__)

JOINT, GENERATION_ONLY = "joint", "generation only"
CONDITIONS = (GENERATION_ONLY, JOINT)
GROUPS = ("seen", "held_out")
"""Groups of drawing tasks that are compared."""
RUNS_FILE, RESULT_FILE, PLOT_FILE = "runs.jsonl", "study.json", "study.png"


@dataclass(frozen=True)
class StudyPlan:
    """How large the study is.

    Raises:
        ValueError: for a value outside its domain; the message names the flag.
    """

    output_dir: Path
    """Gets runs.jsonl, study.json and study.png; a study that was interrupted goes on here."""
    seeds: int = 3
    """Repetitions, each with its own data, connector and order of records."""
    budgets: tuple[int, ...] = (1000, 2000, 4000)
    """Numbers of drawing records that are compared."""
    passes: int = 1
    """How often every record is seen."""
    generation_per_step: int = 16
    """Drawing records of a batch; joint training adds as many questions about pictures."""
    drawings: int = 64
    """Drawings that each model is judged by, in each group."""

    def __post_init__(self) -> None:
        for name in ("seeds", "passes", "generation_per_step", "drawings"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} must be at least 1")
        if not self.budgets or min(self.budgets) < self.generation_per_step:
            raise ValueError(
                f"--budgets {' '.join(map(str, self.budgets))}: give numbers of drawing records, each at least "
                f"--generation-per-step {self.generation_per_step}"
            )

    @property
    def evaluation(self) -> EvaluationSizes:
        """What is evaluated: `seen` yields one-object tasks only in part, so more of it are read."""
        return EvaluationSizes(
            vqa=0, seen=2 * self.drawings, held_out=self.drawings, knowledge=0, edit=0, next_frame=0, visualizer=0
        )


def run_study(plan: StudyPlan, recipe: Recipe = FULL) -> dict[str, Any]:
    """Train and judge every model that is not in `runs.jsonl` yet, and write plot and result.

    Args:
        plan: What is compared.
        recipe: Everything else: connector, learning rates, sampler.

    Returns:
        Content of study.json: `plan`, `runs` (one per trained model) and `summary` (of `summarise_runs`).
    """
    torch.set_num_threads(thread_count())
    plan.output_dir.mkdir(parents=True, exist_ok=True)
    runs = _finished_runs(plan)
    for seed in range(plan.seeds):
        wanted = [(seed, budget, condition) for budget in plan.budgets for condition in CONDITIONS]
        missing = [run for run in wanted if run not in {_key(done) for done in runs}]
        if missing:
            runs += _run_seed(plan, recipe, seed, missing)
    runs = [run for run in runs if run["seed"] < plan.seeds and run["budget"] in plan.budgets]
    summary = summarise_runs(runs)
    result = {"plan": _plain(plan), "runs": runs, "summary": summary}
    (plan.output_dir / RESULT_FILE).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    save_study(plan.output_dir / PLOT_FILE, summary)
    return result


def summarise_runs(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard error over seeds, for each group, condition and budget.

    Args:
        runs: Lines of runs.jsonl.

    Returns:
        `{"group", "condition", "budget", "n": seeds, "mean", "standard_error", "cosine"}`; the standard error of a
        single seed is given as 0.
    """
    rows = []
    for group in GROUPS:
        for condition in CONDITIONS:
            for budget in sorted({run["budget"] for run in runs}):
                found = [run[group] for run in runs if (run["condition"], run["budget"]) == (condition, budget)]
                if not found:
                    continue
                mean, error = _mean_and_error([figures["all"] for figures in found])
                rows.append(
                    {
                        "group": group,
                        "condition": condition,
                        "budget": budget,
                        "n": len(found),
                        "mean": mean,
                        "standard_error": error,
                        "cosine": _mean_and_error([figures["cosine"] for figures in found])[0],
                    }
                )
    return rows


def _run_seed(
    plan: StudyPlan, recipe: Recipe, seed: int, wanted: Sequence[tuple[int, int, str]]
) -> list[dict[str, Any]]:
    """Train and judge the models of one seed; every finished one is written down at once."""
    folder = plan.output_dir / f"seed-{seed}"
    assets = {name: asset_path(name) for name in PARTS}
    space = Workspace(folder, assets, seed)
    most = max(plan.budgets)
    sizes = WorldSizes(
        captions=recipe.sizes.captions,
        vqa=most,
        text_vqa=0,
        text_to_image=most,
        edits=0,
        next_frames=0,
        facts=0,
        knowledge_prompts=0,
        visualizer=0,
        evaluation=plan.evaluation.largest,
    )
    files = write_dataset(space.data, seed=seed, sizes=sizes)
    if not (space.connector / "mm_projector.safetensors").is_file():
        train_connector(space, files, recipe)
    records: dict[str, list[str]] = {"text_to_image": [], "vqa": []}
    for line in files.stage2.read_text(encoding="utf-8").splitlines():
        records[json.loads(line)["task"]].append(line)
    finished = []
    for _, budget, condition in wanted:
        run = _run_one(plan, recipe, space, files, records, budget, condition)
        with (plan.output_dir / RUNS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(run) + "\n")
        finished.append(run)
    shutil.rmtree(folder)
    return finished


def _run_one(
    plan: StudyPlan,
    recipe: Recipe,
    space: Workspace,
    files: WorldFiles,
    records: dict[str, list[str]],
    budget: int,
    condition: str,
) -> dict[str, Any]:
    lines = records["text_to_image"][:budget] + (records["vqa"][:budget] if condition == JOINT else [])
    data = space.data / "study.jsonl"
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    shutil.rmtree(space.model, ignore_errors=True)  # else the next run would go on where this one ends
    recipe = study_recipe(plan, recipe, budget, condition)
    logger.info("study: seed %d, %d drawing records, %s, %d steps", space.seed, budget, condition, recipe.stage2_steps)
    result = train_model(space, replace(files, stage2=data), recipe)
    figures = _judge(plan, recipe, space, files)
    losses = [line["visual_loss"] for line in result.log_history if "visual_loss" in line]
    return {
        "seed": space.seed,
        "budget": budget,
        "condition": condition,
        "steps": recipe.stage2_steps,
        "visual_loss": losses[-1] if losses else None,  # shorter than the first line of the log
        "seconds": round(result.metrics["train_runtime"], 1),
        **figures,
    }


def study_recipe(plan: StudyPlan, recipe: Recipe, budget: int, condition: str) -> Recipe:
    """A recipe with the study's batch and steps: both conditions take the same number of steps.

    Args:
        plan: The study.
        recipe: Where everything else comes from.
        budget: Drawing records.
        condition: One of `CONDITIONS`.
    """
    batch = plan.generation_per_step * (2 if condition == JOINT else 1)
    return replace(recipe, batch_size=batch, stage2_steps=math.ceil(plan.passes * budget / plan.generation_per_step))


def _judge(plan: StudyPlan, recipe: Recipe, space: Workspace, files: WorldFiles) -> dict[str, dict[str, float]]:
    model = MetaMorphForConditionalGeneration.from_pretrained(space.model, dtype=torch.float32).eval()
    processor = MetaMorphProcessor.from_pretrained(space.model)
    pipeline = VisualizationPipeline.from_pretrained(asset_path("mini") / "visualizer")
    pipeline.set_progress_bar_config(disable=True)
    settings = SamplerSettings(recipe.guidance_scale, recipe.sampling_steps, seed=space.seed)
    every = drawing_tasks(files, plan.evaluation)
    chosen = {group: every[group][: plan.drawings] for group in GROUPS}
    drawings = {}
    with Progress(desc="drawings", total=2 * sum(map(len, chosen.values())), unit="step") as progress:
        for group, tasks in chosen.items():
            drawings[group] = draw_tasks(model, processor, pipeline, tasks, judge_scene, settings, progress.update)
    tokens = compare_tokens(model, processor, drawings)
    return {group: {**summarise(drawings[group], VERDICTS), **tokens[group]} for group in GROUPS}


def _finished_runs(plan: StudyPlan) -> list[dict[str, Any]]:
    """Runs of an interrupted study with the same plan.

    Raises:
        ValueError: if the folder holds a study with another plan.
    """
    plan_file, wanted = plan.output_dir / "plan.json", _comparable(plan)
    if plan_file.is_file():
        found = json.loads(plan_file.read_text(encoding="utf-8"))
        if found != wanted:
            raise ValueError(
                f"--output-dir {plan.output_dir} holds a study with another plan, {found}; give another folder"
            )
    plan_file.write_text(json.dumps(wanted) + "\n", encoding="utf-8")
    path = plan.output_dir / RUNS_FILE
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def _comparable(plan: StudyPlan) -> dict[str, Any]:
    """What two parts of one study must share; seeds may be added, and so may budgets."""
    return {
        name: value for name, value in _plain(plan).items() if name in ("passes", "generation_per_step", "drawings")
    }


def _plain(plan: StudyPlan) -> dict[str, Any]:
    values = asdict(plan)
    del values["output_dir"]
    return {**values, "budgets": list(plan.budgets)}


def _key(run: dict[str, Any]) -> tuple[int, int, str]:
    return run["seed"], run["budget"], run["condition"]


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and standard error of the mean (0 for a single value)."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return round(mean, 4), 0.0
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return round(mean, 4), round(math.sqrt(variance / len(values)), 4)
