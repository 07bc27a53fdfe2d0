"""Evaluation of the quickstart: the records of the miniature world as tasks, and the pixel checker as their judge."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from metamorph.evaluation.drawings import Drawing, DrawingTask, draw_tasks, encode_pictures, summarise
from metamorph.evaluation.questions import Question, QuestionResults, ask, fraction
from metamorph.evaluation.tokens import mean_cosine, nearest_candidates
from metamorph.inference.draw import SamplerSettings, draw
from metamorph.inference.reply import Prompt
from metamorph.miniature.quickstart.recipe import EvaluationSizes
from metamorph.miniature.world.checker import judge
from metamorph.miniature.world.dataset import WorldFiles
from metamorph.miniature.world.render import render
from metamorph.miniature.world.scenes import Scene, single_scenes
from metamorph.models.modeling_metamorph import MetaMorphForConditionalGeneration
from metamorph.models.processing_metamorph import MetaMorphProcessor
from metamorph.runs.progress import Progress
from metamorph.visualization.pipeline import VisualizationPipeline


VERDICTS = ("all", "color", "shape", "size", "position")
"""What the checker says of a picture; `all` includes the number of objects."""
DRAWING_GROUPS = ("seen", "pairs", "held_out", "knowledge", "edit", "next_frame")
"""Groups of drawing tasks, in the order of the report."""


@dataclass(frozen=True)
class Redrawing:
    """A picture drawn again from its true tokens."""

    scene: Scene
    """What it shows."""
    original: Image.Image
    """The picture that the tower saw."""
    picture: Image.Image
    """What the visualizer made of it."""
    verdict: dict[str, bool]
    """The checker's verdicts about `picture`."""


@dataclass(frozen=True)
class WorldEvaluation:
    """Everything that was evaluated, with the pictures."""

    questions: QuestionResults
    """Visual question answering."""
    drawings: dict[str, list[Drawing]]
    """By group of `DRAWING_GROUPS`; a target is a `Scene`."""
    tokens: dict[str, dict[str, float]]
    """By group: `cosine` with the true tokens, and `nearest`, the share whose nearest scene is the right one."""
    redrawings: list[Redrawing]
    """The visualizer alone."""

    def metrics(self) -> dict[str, Any]:
        """The measured part of metrics.json."""
        drawn = {
            group: {**summarise(items, VERDICTS), "tokens": self.tokens[group]}
            for group, items in self.drawings.items()
        }
        edit, next_frame = drawn.pop("edit"), drawn.pop("next_frame")
        return {
            "vqa": self.questions.to_dict(),
            "generation": drawn,
            "edit": edit,
            "next_frame": next_frame,
            "visualizer": self._visualizer(),
            "image_start": self._image_start(),
        }

    def _visualizer(self) -> dict[str, Any]:
        by_count = {
            name: [item.verdict["all"] for item in self.redrawings if len(item.scene.objects) == count]
            for name, count in (("singles", 1), ("pairs", 2))
        }
        return {
            "n": len(self.redrawings),
            **{name: fraction([item.verdict[name] for item in self.redrawings]) for name in VERDICTS},
            **{name: {"n": len(rights), "all": fraction(rights)} for name, rights in by_count.items()},
        }

    def _image_start(self) -> dict[str, Any]:
        """Whether exactly one picture came when one was asked for, and none when not."""
        asked = [item.reply.num_images == 1 for items in self.drawings.values() for item in items]
        not_asked = [item.reply.num_images == 0 for item in self.questions.answered]
        return {
            "asked": {"n": len(asked), "emitted": fraction(asked)},
            "not_asked": {"n": len(not_asked), "emitted": round(1 - fraction(not_asked), 4)},
            "accuracy": fraction(asked + not_asked),
        }


def judge_scene(picture: Image.Image, scene: Scene) -> dict[str, bool]:
    """The checker's verdicts by the names of `VERDICTS`."""
    verdict = judge(picture, scene)
    return {name: bool(getattr(verdict, name)) for name in VERDICTS}


def evaluate_world(
    model: MetaMorphForConditionalGeneration,
    processor: MetaMorphProcessor,
    pipeline: VisualizationPipeline,
    files: WorldFiles,
    sizes: EvaluationSizes,
    settings: SamplerSettings,
) -> WorldEvaluation:
    """Ask, let draw, and judge.

    Args:
        model: The trained model.
        processor: Its processor.
        pipeline: The trained visualizer.
        files: Where the evaluation records are.
        sizes: How many of them are used.
        settings: How the visualizer draws.
    """
    pipeline.set_progress_bar_config(disable=True)
    tasks = drawing_tasks(files, sizes)
    questions = read_questions(files, sizes.vqa)
    with Progress(desc="questions", total=len(questions), unit="question") as bar:
        answers = ask(model, processor, questions, on_progress=bar.update)
    drawings = {}
    with Progress(desc="drawings", total=2 * sum(map(len, tasks.values())), unit="step") as bar:
        for group in DRAWING_GROUPS:
            drawings[group] = draw_tasks(model, processor, pipeline, tasks[group], judge_scene, settings, bar.update)
    return WorldEvaluation(
        questions=answers,
        drawings=drawings,
        tokens=compare_tokens(model, processor, drawings),
        redrawings=_redraw(model, processor, pipeline, files, sizes.visualizer, settings),
    )


def read_questions(files: WorldFiles, count: int) -> list[Question]:
    """The first `count` questions of the evaluation file."""
    return [
        Question(record["type"], _prompt(record, files.image_folder), record["answer"])
        for record in _records(files.evaluation["vqa"], count)
    ]


def drawing_tasks(files: WorldFiles, sizes: EvaluationSizes) -> dict[str, list[DrawingTask]]:
    """Tasks by group; `seen` has one object and `pairs` two."""
    tasks: dict[str, list[DrawingTask]] = {group: [] for group in DRAWING_GROUPS}
    for split, count in (("seen", sizes.seen), ("held_out", sizes.held_out)):
        chosen = _records(files.evaluation["generation"], count, split=split)
        for record in chosen:
            is_pair = split == "seen" and len(record["scene"]["objects"]) == 2
            tasks["pairs" if is_pair else split].append(_task(record, files.image_folder))
    for group, count in (("knowledge", sizes.knowledge), ("edit", sizes.edit), ("next_frame", sizes.next_frame)):
        tasks[group] = [_task(record, files.image_folder) for record in _records(files.evaluation[group], count)]
    return tasks


def compare_tokens(
    model: MetaMorphForConditionalGeneration, processor: MetaMorphProcessor, drawings: dict[str, list[Drawing]]
) -> dict[str, dict[str, float]]:
    """Compare generated visual tokens with true ones; see `WorldEvaluation.tokens`.

    The candidates for the nearest scene are all scenes of one object and all targets. A task without a picture has
    no cosine and counts as wrong.
    """
    every = [item for items in drawings.values() for item in items]
    scenes = list(dict.fromkeys([*single_scenes(), *(item.task.target for item in every)]))
    place = {scene: index for index, scene in enumerate(scenes)}
    candidates = encode_pictures(model, processor, [render(scene) for scene in scenes])
    found = {}
    for group, items in drawings.items():
        cosines, right = [], []
        for item in items:
            if not item.reply.num_images:
                right.append(False)
                continue
            tokens = item.reply.visual_tokens[:1]
            target = place[item.task.target]
            cosines.append(mean_cosine(tokens, candidates[target : target + 1]).item())
            right.append(nearest_candidates(tokens, candidates).item() == target)
        cosine = round(sum(cosines) / len(cosines), 4) if cosines else 0.0
        found[group] = {"cosine": cosine, "nearest": fraction(right)}
    return found


def seen_color(generation: dict[str, dict[str, float]]) -> float:
    """Share of drawings of seen combinations whose colours are right: one object (`seen`) and two (`pairs`) together.

    Args:
        generation: `metrics["generation"]`.
    """
    groups = [generation[name] for name in ("seen", "pairs")]
    return sum(group["n"] * group["color"] for group in groups) / max(sum(group["n"] for group in groups), 1)


def _redraw(
    model: MetaMorphForConditionalGeneration,
    processor: MetaMorphProcessor,
    pipeline: VisualizationPipeline,
    files: WorldFiles,
    count: int,
    settings: SamplerSettings,
) -> list[Redrawing]:
    records = _records(files.evaluation["visualizer"], count)
    scenes = [Scene.from_dict(record["scene"]) for record in records]
    originals = [_open(files.image_folder / record["image"]) for record in records]
    tokens = encode_pictures(model, processor, originals)
    with Progress(desc="visualizer", total=count, unit="picture") as bar:
        pictures = draw(pipeline, tokens, settings, bar.update)
    return [
        Redrawing(scene, original, picture, judge_scene(picture, scene))
        for scene, original, picture in zip(scenes, originals, pictures, strict=True)
    ]


def _task(record: dict[str, Any], image_folder: Path) -> DrawingTask:
    scene = Scene.from_dict(record["scene"])
    return DrawingTask(_prompt(record, image_folder), scene)


def _prompt(record: dict[str, Any], image_folder: Path) -> Prompt:
    """The first turn of a record, with as many of its pictures as it has markers."""
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
