"""Writes the miniature world to disk: LLaVA JSONL and PNG files for both stages, the visualizer and evaluation.

Training images show scenes that are not reserved (`is_reserved`). Evaluation asks about and for reserved scenes, with
one exception: a knowledge prompt of evaluation names a thing that no training record draws, but its image (one large
object in the centre, on white) may occur in training. Input images have jitter. Answer images have none, because no
prompt could specify it; in training files they show no held-out (colour, shape) pair.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from metamorph.miniature.world.changes import EDIT_KINDS, NEXT_FRAME_PROMPTS, edit, next_frame
from metamorph.miniature.world.knowledge import THINGS, fact_questions, knowledge_prompt
from metamorph.miniature.world.language import CAPTION_REQUESTS, caption, sentence
from metamorph.miniature.world.render import render
from metamorph.miniature.world.scenes import HELD_OUT, Scene, is_reserved, pick, sample_scene
from metamorph.miniature.world.worlds import BASIC, World
from metamorph.runs.progress import Progress


@dataclass(frozen=True)
class WorldSizes:
    """Number of records of each kind."""

    captions: int = 0
    """Stage 1: images with descriptions."""
    vqa: int = 0
    """Stage 2: images with up to `questions_per_image` questions in one conversation."""
    questions_per_image: int = 3
    """Questions in a training conversation; evaluation conversations have one."""
    text_vqa: int = 0
    """Stage 2: the same questions about descriptions in words, without an image."""
    text_to_image: int = 0
    """Stage 2: drawing prompts."""
    edits: int = 0
    """Stage 2: an image, an instruction, the edited image."""
    next_frames: int = 0
    """Stage 2: two frames and the third."""
    facts: int = 0
    """Stage 2: questions about things, in words only."""
    knowledge_prompts: int = 0
    """Stage 2: drawing prompts that need a fact, for things that training may draw."""
    visualizer: int = 0
    """Images in the visualizer's folder."""
    evaluation: int = 0
    """Records of each evaluation file."""
    pair_fraction: float = 0.35
    """Share of scenes with two objects in training records; in evaluation records it is always 0.35.

    The others have one object, in the rich world three.
    """


@dataclass(frozen=True)
class WorldFiles:
    """The files that `write_dataset` writes."""

    image_folder: Path
    """Folder that the image paths of records are relative to."""
    stage1: Path
    """Captions."""
    stage2: Path
    """The mixture; each record names its `task`."""
    visualizer_folder: Path
    """PNG files of training scenes, including held-out pairs: the decoder may know how everything looks."""
    evaluation: dict[str, Path]
    """Files by name: `vqa`, `generation`, `edit`, `next_frame`, `knowledge`, `visualizer`.

    Besides the LLaVA fields a record has `task`; `type` and `answer` (vqa); `scene`, which the answer image must show,
    in the form of `Scene.to_dict` (all others); `split`, `seen` or `held_out` (generation).
    """


def write_dataset(folder: str | Path, *, seed: int = 0, sizes: WorldSizes, world: World = BASIC) -> WorldFiles:
    """Write training and evaluation data; the same seed, sizes and world give the same bytes.

    Existing files are replaced. Edits, next frames and knowledge are those of the basic world in any world.
    """
    folder = Path(folder)
    writer = _Writer(folder / "images", seed, sizes, world)
    stage2 = [
        *writer.records("vqa", sizes.vqa, writer.vqa),
        *writer.records("text_vqa", sizes.text_vqa, writer.text_vqa),
        *writer.records("text_to_image", sizes.text_to_image, writer.drawing),
        *writer.records("image_edit", sizes.edits, writer.edit),
        *writer.records("next_frame", sizes.next_frames, writer.next_frame),
        *writer.records("facts", sizes.facts, _facts),
        *writer.records("knowledge", sizes.knowledge_prompts, writer.knowledge),
    ]
    order = np.random.default_rng([seed, 0]).permutation(len(stage2))
    count = sizes.evaluation
    evaluation = {
        "vqa": writer.records("eval_vqa", count, writer.vqa_test),
        "generation": [
            *writer.records("eval_seen", count, partial(writer.drawing, reserved=True)),
            *writer.records("eval_held_out", count, writer.held_out_drawing),
        ],
        "edit": writer.records("eval_edit", count, partial(writer.edit, reserved=True)),
        "next_frame": writer.records("eval_next", count, partial(writer.next_frame, reserved=True)),
        "knowledge": writer.records("eval_knowledge", count, partial(writer.knowledge, drawn=False)),
        "visualizer": writer.records("eval_visualizer", count, writer.visualizer_test),
    }
    captions = writer.records("captions", sizes.captions, writer.caption)
    return WorldFiles(
        image_folder=writer.image_folder,
        stage1=_write_jsonl(folder / "stage1.jsonl", captions),
        stage2=_write_jsonl(folder / "stage2.jsonl", (stage2[i] for i in order)),
        visualizer_folder=_write_visualizer_folder(folder / "visualizer", seed, sizes.visualizer, world),
        evaluation={name: _write_jsonl(folder / f"eval_{name}.jsonl", records) for name, records in evaluation.items()},
    )


class _Writer:
    """Samples records and saves their images; every record has its own random generator, seeded by its name."""

    def __init__(self, image_folder: Path, seed: int, sizes: WorldSizes, world: World) -> None:
        image_folder.mkdir(parents=True, exist_ok=True)
        self.image_folder = image_folder
        self.seed = seed
        self.sizes = sizes
        self.world = world
        self._id = ""
        self._images = 0

    def records(self, name: str, count: int, make: Callable[[np.random.Generator], dict]) -> list[dict]:
        """`count` records with the ids `{name}-{index}`."""
        found = []
        for index in Progress(range(count), f"writing {name}", unit="record", delay=2):
            self._id, self._images = f"{name}-{index:05d}", 0
            rng = np.random.default_rng([self.seed, 1, *name.encode(), index])
            found.append({"id": self._id, **make(rng)})
        return found

    def caption(self, rng: np.random.Generator) -> dict:
        scene = self._sample(rng)
        request = sentence(pick(rng, CAPTION_REQUESTS), rng)
        image = self._save(scene, rng)
        return _record("caption", (f"<image>\n{request}", caption(scene, rng)), image=image)

    def vqa(self, rng: np.random.Generator) -> dict:
        scene = self._sample(rng)
        (first, answer), *others = self._some_questions(scene, rng)
        return _record("vqa", (f"<image>\n{first}", answer), *others, image=self._save(scene, rng))

    def text_vqa(self, rng: np.random.Generator) -> dict:
        scene = self._sample(rng)
        (first, answer), *others = self._some_questions(scene, rng)
        return _record("text_vqa", (f"{caption(scene, rng)}\n{first}", answer), *others)

    def vqa_test(self, rng: np.random.Generator) -> dict:
        wanted = pick(rng, self.world.question_types)
        while True:
            scene = self.world.sample(rng, reserved=True)
            found = {kind: (question, answer) for kind, question, answer in self.world.questions(scene, rng)}
            if wanted in found:
                break
        question, answer = found[wanted]
        turn = (f"<image>\n{question}", answer)
        return _record("vqa", turn, type=wanted, answer=answer, image=self._save(scene, rng))

    def drawing(self, rng: np.random.Generator, *, reserved: bool = False) -> dict:
        background = "grey" if rng.random() < 0.25 else "white"
        scene = self._sample(rng, reserved=reserved, background=background, allow_held_out=False)
        extra = {"split": "seen"} if reserved else {}
        return self._drawing("text_to_image", self.world.drawing_prompt(scene, rng), scene, **extra)

    def held_out_drawing(self, rng: np.random.Generator) -> dict:
        """A scene with a held-out pair, every pair equally often, that is in no training image, inputs included."""
        wanted = pick(rng, sorted(HELD_OUT))
        while True:
            scene = self.world.sample(rng, num_objects=self.world.held_out_objects, background="white", reserved=True)
            if any((item.color, item.shape) == wanted for item in scene.objects):
                return self._drawing("text_to_image", self.world.drawing_prompt(scene, rng), scene, split="held_out")

    def edit(self, rng: np.random.Generator, *, reserved: bool = False) -> dict:
        wanted = pick(rng, EDIT_KINDS)
        while True:
            scene = sample_scene(rng, reserved=reserved, **self._pair_share(reserved))
            kind, instruction, changed = edit(scene, rng)
            if kind == wanted and not changed.has_held_out and is_reserved(changed) == reserved:
                break
        images = [self._save(scene, rng), self._save(changed)]
        turn = (f"<image>\n{instruction}", "<image>")
        return _record("image_edit", turn, type=kind, scene=changed.to_dict(), image=images)

    def next_frame(self, rng: np.random.Generator, *, reserved: bool = False) -> dict:
        while True:
            scene = sample_scene(rng, num_objects=1, allow_held_out=False, reserved=None)
            frames = next_frame(scene, rng)
            if is_reserved(frames[2]) if reserved else not any(map(is_reserved, frames)):
                break
        prompt = sentence(pick(rng, NEXT_FRAME_PROMPTS), rng)
        images = [self._save(frames[0], rng), self._save(frames[1], rng), self._save(frames[2])]
        turn = (f"<image>\n<image>\n{prompt}", "<image>")
        return _record("next_frame", turn, scene=frames[2].to_dict(), image=images)

    def knowledge(self, rng: np.random.Generator, *, drawn: bool = True) -> dict:
        while True:
            prompt, scene, _ = knowledge_prompt(rng, drawn=drawn)
            # In evaluation the thing is new, whatever the scene: too few scenes of this kind are reserved to ask for
            # every colour and shape. A training prompt must not show a reserved scene.
            if not drawn or not is_reserved(scene):
                return self._drawing("knowledge", prompt, scene)

    def visualizer_test(self, rng: np.random.Generator) -> dict:
        scene = self.world.sample(rng, reserved=True)
        turn = ("<image>", caption(scene, rng))
        return _record("visualizer", turn, scene=scene.to_dict(), image=self._save(scene))

    def _sample(self, rng: np.random.Generator, *, reserved: bool = False, **wanted: Any) -> Scene:
        return self.world.sample(rng, reserved=reserved, **self._pair_share(reserved), **wanted)

    def _pair_share(self, reserved: bool) -> dict[str, Any]:
        return {} if reserved else {"pair_fraction": self.sizes.pair_fraction}

    def _save(self, scene: Scene, rng: np.random.Generator | None = None) -> str:
        """Save an image of the current record; returns its path relative to the image folder."""
        path = f"{self._id}-{self._images}.png"
        self._images += 1
        render(scene, rng).save(self.image_folder / path)
        return path

    def _some_questions(self, scene: Scene, rng: np.random.Generator) -> list[tuple[str, str]]:
        found = self.world.questions(scene, rng)
        return [found[i][1:] for i in rng.permutation(len(found))[: self.sizes.questions_per_image]]

    def _drawing(self, task: str, prompt: str, scene: Scene, **extra: str) -> dict:
        return _record(task, (prompt, "<image>"), **extra, scene=scene.to_dict(), image=self._save(scene))


def _record(task: str, *turns: tuple[str, str], **fields: Any) -> dict:
    speakers = [
        {"from": speaker, "value": text} for pair in turns for speaker, text in zip(("human", "gpt"), pair, strict=True)
    ]
    return {"task": task, **fields, "conversations": speakers}


def _facts(rng: np.random.Generator) -> dict:
    found = fact_questions(pick(rng, THINGS), rng)
    return _record("facts", *(found[i] for i in rng.permutation(len(found))))


def _write_visualizer_folder(folder: Path, seed: int, count: int, world: World) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        rng = np.random.default_rng([seed, 2, index])
        render(world.sample(rng)).save(folder / f"{index:05d}.png")
    return folder


def _write_jsonl(path: Path, records: Iterable[dict]) -> Path:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    return path
