"""Evaluation in the miniature world: its records as tasks, and the pixel checker as the judge."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from metamorph.evaluation.drawings import Drawing, DrawingTask, draw_tasks, encode_images, summarise
from metamorph.evaluation.questions import AnsweredQuestion, Question, ask, fraction, summarise_answers
from metamorph.evaluation.tokens import cosines, num_nearer
from metamorph.inference import Prompt, SamplerSettings, Session, draw, load
from metamorph.miniature.quickstart.recipe import EvaluationSizes, Recipe
from metamorph.miniature.world.checker import judge
from metamorph.miniature.world.dataset import WorldFiles
from metamorph.miniature.world.render import render
from metamorph.miniature.world.scenes import Scene, single_scenes
from metamorph.runs.progress import Progress


VERDICTS = ("all", "color", "shape", "size", "position")
"""Verdicts of the checker; `all` includes the number of objects."""
DRAWING_GROUPS = ("seen", "pairs", "held_out", "knowledge", "edit", "next_frame")
"""Groups of drawing tasks, in the order of the report."""


@dataclass(frozen=True)
class Reconstruction:
    """An image reconstructed from its true tokens."""

    scene: Scene
    original: Image.Image
    image: Image.Image
    verdict: dict[str, bool]


@dataclass(frozen=True)
class WorldEvaluation:
    """Everything that was evaluated, with the images."""

    questions: list[AnsweredQuestion]
    drawings: dict[str, list[Drawing]]
    """By group of `DRAWING_GROUPS`; a target is a `Scene`."""
    tokens: dict[str, dict[str, float]]
    """By group: `cosine` to the true tokens, and `nearest`, the share whose nearest scene is the right one."""
    reconstructions: list[Reconstruction]

    def metrics(self) -> dict[str, Any]:
        """The measured part of metrics.json."""
        drawn = {
            group: {**summarise(items, VERDICTS), "tokens": self.tokens[group]}
            for group, items in self.drawings.items()
        }
        changes = {name: drawn.pop(name) for name in ("edit", "next_frame")}
        found = {"vqa": summarise_answers(self.questions), "generation": drawn, **changes}
        return {**found, "visualizer": self._visualizer(), "image_start": self._image_start()}

    def _visualizer(self) -> dict[str, Any]:
        by_count = {
            name: [item.verdict["all"] for item in self.reconstructions if len(item.scene.objects) == count]
            for name, count in (("singles", 1), ("pairs", 2))
        }
        return {
            "n": len(self.reconstructions),
            **{name: fraction([item.verdict[name] for item in self.reconstructions]) for name in VERDICTS},
            **{name: {"n": len(rights), "all": fraction(rights)} for name, rights in by_count.items()},
        }

    def _image_start(self) -> dict[str, Any]:
        """Whether the model drew exactly one image if asked for one, and none otherwise."""
        asked = [item.reply.num_images == 1 for items in self.drawings.values() for item in items]
        not_asked = [item.reply.num_images == 0 for item in self.questions]
        return {
            "asked": {"n": len(asked), "emitted": fraction(asked)},
            "not_asked": {"n": len(not_asked), "emitted": round(1 - fraction(not_asked), 4)},
            "accuracy": fraction(asked + not_asked),
        }


def judge_scene(image: Image.Image, scene: Scene) -> dict[str, bool]:
    """The checker's verdicts by the names of `VERDICTS`."""
    verdict = judge(image, scene)
    return {name: bool(getattr(verdict, name)) for name in VERDICTS}


def load_session(model: str | Path, visualizer: str | Path) -> Session:
    """Load trained folders as a user would, in float32 on the CPU."""
    return load(model, visualizer, device="cpu", dtype=torch.float32)


def evaluate_world(
    model: str | Path, visualizer: str | Path, files: WorldFiles, recipe: Recipe, seed: int
) -> WorldEvaluation:
    """Ask a model questions, let it draw, and judge: as many records as `recipe` says, with noise from `seed`."""
    session = load_session(model, visualizer)
    settings = SamplerSettings(recipe.guidance_scale, recipe.sampling_steps, seed)
    sizes = recipe.evaluation
    answers = ask_questions(session, files, sizes.vqa)
    drawings = draw_groups(session, drawing_tasks(files, sizes), settings)
    tokens = compare_tokens(session, drawings)
    return WorldEvaluation(answers, drawings, tokens, _reconstruct(session, files, sizes.visualizer, settings))


def ask_questions(session: Session, files: WorldFiles, count: int) -> list[AnsweredQuestion]:
    """Ask the first `count` questions of evaluation."""
    questions = [
        Question(record["type"], _prompt(record, files.image_folder), record["answer"])
        for record in _records(files.evaluation["vqa"], count)
    ]
    with Progress(desc="questions", total=len(questions), unit="question") as bar:
        return ask(session.model, session.processor, questions, on_progress=bar.update)


def draw_groups(
    session: Session, tasks: dict[str, list[DrawingTask]], settings: SamplerSettings
) -> dict[str, list[Drawing]]:
    """Draw and judge the tasks of every group."""
    with Progress(desc="drawings", total=2 * sum(map(len, tasks.values())), unit="step") as bar:
        return {
            group: draw_tasks(
                session.model, session.processor, session.visualizer, items, judge_scene, settings, bar.update
            )
            for group, items in tasks.items()
        }


def drawing_tasks(files: WorldFiles, sizes: EvaluationSizes) -> dict[str, list[DrawingTask]]:
    """Tasks by group; `seen` has one object and `pairs` two."""
    tasks: dict[str, list[DrawingTask]] = {group: [] for group in DRAWING_GROUPS}
    for group, count, wanted in (
        ("seen", sizes.seen, {"split": "seen"}),
        ("held_out", sizes.held_out, {"split": "held_out"}),
        ("knowledge", sizes.knowledge, {}),
        ("edit", sizes.edit, {}),
        ("next_frame", sizes.next_frame, {}),
    ):
        for record in _records(files.evaluation["generation" if wanted else group], count, **wanted):
            scene = Scene.from_dict(record["scene"])
            is_pair = group == "seen" and len(scene.objects) == 2
            tasks["pairs" if is_pair else group].append(DrawingTask(_prompt(record, files.image_folder), scene))
    return tasks


def compare_tokens(session: Session, drawings: dict[str, list[Drawing]]) -> dict[str, dict[str, float]]:
    """Compare generated visual tokens with true ones; see `WorldEvaluation.tokens`.

    The candidates for the nearest scene are all scenes of one object and all targets. A task without an image has no
    cosine and counts as wrong.
    """
    targets = (item.task.target for items in drawings.values() for item in items)
    scenes = list(dict.fromkeys([*single_scenes(), *targets]))
    place = {scene: index for index, scene in enumerate(scenes)}
    candidates = encode_images(session.model, session.processor, [render(scene) for scene in scenes])
    found = {}
    for group, items in drawings.items():
        own, right = [], [False] * len(items)
        for index, item in enumerate(items):
            if item.reply.num_images:
                tokens, target = item.reply.visual_tokens[:1], place[item.task.target]
                similar = cosines(tokens, candidates)
                own.append(similar[0, target].item())
                right[index] = num_nearer(similar, similar[:, target]).item() == 0
        cosine = round(sum(own) / len(own), 4) if own else 0.0
        found[group] = {"cosine": cosine, "nearest": fraction(right)}
    return found


def seen_color(generation: dict[str, dict[str, float]]) -> float:
    """Share of drawings with the right colours in `seen` and `pairs` together, from `metrics["generation"]`."""
    groups = [generation[name] for name in ("seen", "pairs")]
    return sum(group["n"] * group["color"] for group in groups) / max(sum(group["n"] for group in groups), 1)


def _reconstruct(session: Session, files: WorldFiles, count: int, settings: SamplerSettings) -> list[Reconstruction]:
    records = _records(files.evaluation["visualizer"], count)
    scenes = [Scene.from_dict(record["scene"]) for record in records]
    originals = [_open(files.image_folder / record["image"]) for record in records]
    tokens = encode_images(session.model, session.processor, originals)
    with Progress(desc="visualizer", total=count, unit="image") as bar:
        images = draw(session.visualizer, tokens, settings, bar.update)
    return [
        Reconstruction(scene, original, image, judge_scene(image, scene))
        for scene, original, image in zip(scenes, originals, images, strict=True)
    ]


def _prompt(record: dict[str, Any], image_folder: Path) -> Prompt:
    """The first turn of a record, with one of its images for each marker."""
    text = record["conversations"][0]["value"]
    images = record.get("image", [])
    names = [images] if isinstance(images, str) else images
    return Prompt(text, tuple(_open(image_folder / name) for name in names[: text.count("<image>")]))


def _open(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def _records(path: Path, count: int, **wanted: str) -> Sequence[dict[str, Any]]:
    """The first `count` records that have the wanted values."""
    with path.open(encoding="utf-8") as file:
        return [record for record in map(json.loads, file) if wanted.items() <= record.items()][:count]
