"""What packing does to learning: how mixed and how full rows are, and a small world trained packed and padded.

    python benchmarks/packing.py --seeds 1 2 3 4 --steps 160

Prints both tables and writes all numbers as JSON, with the machine, the versions and the command. Trainings that are
in the file are not repeated.

Every seed trains stage 2 of the quickstart's miniatures three times from the same connector, with as many samples in a
step (on average): packed, packed as before version 2 (the longest samples first, in windows of 16,384), and padded.
The losses are compared on scenes that no training has seen.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from accelerate import Accelerator
from scipy import stats

from data import machine
from metamorph.data.batching.lengths import measure
from metamorph.data.batching.packing import BatchPlanner, Rows, pack_rows
from metamorph.data.dataset import load_data
from metamorph.evaluation.losses import evaluate_losses, total_loss
from metamorph.flags.recipes import parse_arguments
from metamorph.mini import PARTS, asset_path
from metamorph.miniature.quickstart.recipe import FULL
from metamorph.miniature.quickstart.stages import train_connector
from metamorph.miniature.quickstart.workspace import Workspace
from metamorph.miniature.world.dataset import WorldSizes, write_dataset
from metamorph.training import build
from metamorph.training.arguments import DataArguments, MetaMorphTrainingArguments, ModelArguments
from metamorph.training.run import run_training


ROW_LENGTHS = (1024, 4096, 8192)
NUM_SAMPLES = 40_000
"""Samples of each mixture of the first table."""
ARMS = ("packed", "longest first", "padded")
TRAINED_ROW_LENGTH = 256
ROWS_PER_STEP = 4
"""About 22 samples of the small world."""
SIZES = WorldSizes(
    captions=1600,
    vqa=500,
    text_vqa=50,
    text_to_image=800,
    edits=400,
    next_frames=150,
    facts=50,
    knowledge_prompts=100,
    evaluation=200,
)
VALIDATION = ("generation", "edit", "next_frame", "vqa")


def main() -> None:
    """Run both parts, print tables and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks/results/packing.json"), help="JSON file to write"
    )
    parser.add_argument(
        "--seeds", type=int, nargs="*", default=[1, 2, 3, 4], help="of the trainings; none: no training"
    )
    parser.add_argument("--steps", type=int, default=160, help="optimizer steps of a training (default: %(default)s)")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    report: dict[str, Any] = {"machine": machine(), "mix": mix(np.random.default_rng(0))}
    print_mix(report["mix"])
    known = json.loads(flags.output.read_text(encoding="utf-8"))["runs"] if flags.output.is_file() else []
    report["runs"] = [run for run in known if run["steps"] == flags.steps and run["seed"] in flags.seeds]
    done = {(run["arm"], run["seed"]) for run in report["runs"]}
    missing = [(arm, seed) for seed in flags.seeds for arm in ARMS if (arm, seed) not in done]
    with tempfile.TemporaryDirectory() as folder:
        experiment = Experiment(Path(folder), flags.steps) if missing else None
        for arm, seed in missing:
            assert experiment is not None
            report["runs"].append(experiment.train(arm, seed))
            write(report, flags.output)
    write(report, flags.output)
    print_runs(report["runs"], report["differences"])


def write(report: dict[str, Any], path: Path) -> None:
    """Write the results so far: a run that is in the file is not repeated."""
    report["differences"] = differences(report["runs"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


# How mixed rows are.


class SortedPlanner(BatchPlanner):
    """Packs as before version 2: best-fit decreasing, the same rows in all epochs, in random order."""

    def rows(self, epoch: int) -> Rows:
        """The rows of every epoch."""
        order = np.random.default_rng(self.seed).permutation(len(self.lengths))
        return longest_first(self._tokens, self.max_length, order)

    def row_order(self, epoch: int) -> np.ndarray:
        """A random order."""
        return np.random.default_rng([self.seed, epoch]).permutation(self.num_rows)


def longest_first(tokens: np.ndarray, max_length: int, order: np.ndarray, window: int = 16_384) -> Rows:
    """Best-fit decreasing within windows of an order."""
    windows = (order[start : start + window] for start in range(0, len(order), window))
    order = np.concatenate([samples[np.argsort(-tokens[samples], kind="stable")] for samples in windows])
    return pack_rows(tokens, max_length=max_length, order=order, open_rows=len(tokens))


@dataclass(frozen=True)
class Mixture:
    """Samples of several tasks."""

    tokens: np.ndarray
    """int `[samples]`."""
    tasks: np.ndarray
    """int `[samples]`: number of the task."""


def mixtures(rng: np.random.Generator) -> dict[str, Mixture]:
    """Two tasks of narrow lengths, and two mixtures of text, questions about an image, drawing and many images."""
    image = 66
    tasks = rng.integers(0, 2, NUM_SAMPLES)
    narrow = np.where(tasks == 0, rng.integers(54, 59, NUM_SAMPLES), rng.integers(32, 37, NUM_SAMPLES))
    found = {"two tasks of 54–58 and 32–36 tokens": Mixture(narrow, tasks)}
    for name, shares, text, images in (
        ("short text, 3–8 images", [0.4, 0.3, 0.2, 0.1], (5.5, 0.9), (3, 9)),
        ("long text, 8–16 images", [0.25, 0.35, 0.3, 0.1], (6.3, 0.8), (8, 17)),
    ):
        tasks = rng.choice(4, NUM_SAMPLES, p=shares)
        lengths = [
            rng.lognormal(*text, NUM_SAMPLES),
            image + rng.lognormal(4.5, 0.8, NUM_SAMPLES),
            image + rng.lognormal(3.1, 0.4, NUM_SAMPLES),
            image * rng.integers(*images, NUM_SAMPLES) + rng.lognormal(4.5, 0.6, NUM_SAMPLES),
        ]
        found[name] = Mixture(np.choose(tasks, lengths).clip(8, None).astype(int), tasks)
    return found


def mix(rng: np.random.Generator) -> list[dict[str, Any]]:
    """How full rows are, and how the share of a task varies from row to row, compared with rows of random samples."""
    lines = []
    for name, mixture in mixtures(rng).items():
        for max_length in ROW_LENGTHS:
            tokens, order = np.minimum(mixture.tokens, max_length), rng.permutation(NUM_SAMPLES)
            packings = {
                "longest first": longest_first(tokens, max_length, order),
                "random order": pack_rows(tokens, max_length=max_length, order=order),
            }
            for packing, rows in packings.items():
                random = replace(rows, samples=rng.permutation(rows.samples))
                tasks = [mixture.tasks == task for task in np.unique(mixture.tasks)]
                found = [(share_deviation(rows, task), share_deviation(random, task)) for task in tasks]
                deviation, of_random = max(found, key=lambda pair: pair[0] / pair[1])
                line = {"mixture": name, "row": max_length, "packing": packing, "samples": len(tokens) / len(rows)}
                full = float(tokens.sum() / (len(rows) * max_length))
                lines.append({**line, "full": full, "deviation": deviation, "random": of_random})
    return lines


def share_deviation(rows: Rows, chosen: np.ndarray) -> float:
    """Standard deviation over the rows of the share of the chosen samples."""
    return float((rows.sum(chosen) / np.diff(rows.starts)).std())


def print_mix(lines: list[dict[str, Any]]) -> None:
    """The first table: the task of each mixture that is mixed worst."""
    print("| Mixture | row | packing | samples in a row | full | sd of a task's share | of random rows | ratio |")
    print("|---|---:|---|---:|---:|---:|---:|---:|")
    for line in lines:
        print(
            f"| {line['mixture']} | {line['row']} | {line['packing']} | {line['samples']:.1f} | {line['full']:.1%} "
            f"| {line['deviation']:.3f} | {line['random']:.3f} | {line['deviation'] / line['random']:.2f} |"
        )


# What is learned.


class Experiment:
    """Data and connector of all runs, in a folder."""

    def __init__(self, folder: Path, steps: int) -> None:
        self.recipe = replace(FULL, stage1_steps=60, stage2_steps=steps)
        self.space = Workspace(folder, {name: asset_path(name) for name in PARTS}, seed=0)
        self.files = write_dataset(self.space.data, sizes=SIZES)
        self.validation = folder / "validation.jsonl"
        records = [self.files.evaluation[name].read_text(encoding="utf-8") for name in VALIDATION]
        self.validation.write_text("".join(records), encoding="utf-8")
        processor = train_connector(self.space, self.files, self.recipe).processor
        self.lengths = measure(load_data(self.files.stage2, processor, self.files.image_folder))

    def train(self, arm: str, seed: int) -> dict[str, Any]:
        """Train with one seed; the losses on the validation records."""
        planner_class = SortedPlanner if arm == "longest first" else BatchPlanner
        packed = planner_class(
            self.lengths, seed=seed, world_size=1, rows_per_batch=ROWS_PER_STEP, max_length=TRAINED_ROW_LENGTH
        )
        samples = ROWS_PER_STEP * len(self.lengths) / packed.num_rows
        flags = {
            "model_name_or_path": self.space.assets["mini-llama"],
            "vision_tower": self.space.assets["mini-siglip"],
            "pretrain_mm_mlp_adapter": self.space.connector,
            "data_path": self.files.stage2,
            "image_folder": self.files.image_folder,
            "output_dir": self.space.model,
            **self.recipe.stage2_flags(),
            "resume_from_checkpoint": False,
            "seed": seed,
            "model_max_length": TRAINED_ROW_LENGTH,
            "packing": arm != "padded",
            "per_device_train_batch_size": round(samples) if arm == "padded" else ROWS_PER_STEP,
        }
        types = (ModelArguments, DataArguments, MetaMorphTrainingArguments)
        arguments = parse_arguments(types, ["--config", self.space.write_recipe("stage2", flags)])
        with patch.object(build, "BatchPlanner", planner_class):
            result = run_training(*arguments)
        data = load_data(self.validation, result.processor, self.files.image_folder, TRAINED_ROW_LENGTH)
        loss = total_loss(evaluate_losses(result.model, data, Accelerator(cpu=True), batch_size=32))
        samples = flags["per_device_train_batch_size"] if arm == "padded" else samples
        run = {
            "arm": arm,
            "seed": seed,
            "steps": self.recipe.stage2_steps,
            "samples_in_a_step": samples,
            "full": packed.efficiency,
            **loss.as_metrics(),
        }
        print(json.dumps(run), flush=True)
        return run


def differences(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each packed arm minus padded, of the same seeds: mean, standard error and the 95 % interval of Student's t."""
    lines = []
    for arm in ARMS[:-1]:
        for name in ("visual_cosine", "text_loss"):
            values = {(run["arm"], run["seed"]): run[name] for run in runs}
            seeds = [seed for kind, seed in values if kind == arm and ("padded", seed) in values]
            if not seeds:
                continue
            paired = np.array([values[arm, seed] - values["padded", seed] for seed in seeds])
            line = {"arm": arm, "value": name, "mean": float(paired.mean()), "seeds": len(paired)}
            if len(paired) > 1:
                line["error"] = float(stats.sem(paired))
                reach = float(stats.t.ppf(0.975, len(paired) - 1)) * line["error"]
                line["interval"] = [line["mean"] - reach, line["mean"] + reach]
            lines.append(line)
    return lines


def print_runs(runs: list[dict[str, Any]], lines: list[dict[str, Any]]) -> None:
    """The second table, and the differences below."""
    print("\n| Seed | packing | samples in a step | visual cosine | visual loss | text loss |")
    print("|---:|---|---:|---:|---:|---:|")
    for run in runs:
        print(
            f"| {run['seed']} | {run['arm']} | {run['samples_in_a_step']:.1f} | {run['visual_cosine']:.4f} "
            f"| {run['visual_loss']:.4f} | {run['text_loss']:.4f} |"
        )
    for line in lines:
        low, high = line.get("interval", (float("nan"),) * 2)
        print(
            f"{line['arm']} − padded, {line['value']}: {line['mean']:+.4f} ± {line.get('error', float('nan')):.4f}, "
            f"95 % interval {low:+.4f} to {high:+.4f} ({line['seeds']} seeds)"
        )


if __name__ == "__main__":
    main()
