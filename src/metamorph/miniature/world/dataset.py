"""Writes the miniature world to disk: LLaVA JSONL and PNG files for both stages, the visualizer and evaluation.

Training pictures show scenes that are not reserved (`is_reserved`). What evaluation
asks about or wants drawn is a reserved scene, with one exception: a knowledge prompt of evaluation names a thing that
no training record draws, but the picture that it asks for (one large object in the centre, on white) may be one of
training. Input pictures are drawn with jitter, answer pictures exactly, because nothing in a prompt tells the jitter.
No answer picture of a training file shows a held-out (colour, shape) pair.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from metamorph.miniature.world.changes import EDIT_KINDS, NEXT_FRAME_PROMPTS, edit, next_frame
from metamorph.miniature.world.knowledge import THINGS, fact_questions, knowledge_prompt
from metamorph.miniature.world.language import (
    CAPTION_REQUESTS,
    QUESTION_TYPES,
    caption,
    drawing_prompt,
    pick,
    questions,
    sentence,
)
from metamorph.miniature.world.render import render
from metamorph.miniature.world.scenes import HELD_OUT, Scene, is_reserved, sample_scene
from metamorph.runs.progress import Progress


_PAIR_FRACTION = 0.35


@dataclass(frozen=True)
class WorldSizes:
    """Number of records of every kind."""

    captions: int = 1500
    """Stage 1: pictures with descriptions."""
    vqa: int = 3000
    """Stage 2: pictures with up to `questions_per_image` questions in one conversation."""
    questions_per_image: int = 3
    """Questions of a training conversation; evaluation conversations have one."""
    text_vqa: int = 500
    """Stage 2: the same questions about descriptions in words, without a picture."""
    text_to_image: int = 3000
    """Stage 2: drawing prompts."""
    edits: int = 1500
    """Stage 2: a picture, an instruction, the edited picture."""
    next_frames: int = 500
    """Stage 2: two frames and the third."""
    facts: int = 500
    """Stage 2: questions about things, in words only."""
    knowledge_prompts: int = 400
    """Stage 2: drawing prompts that need a fact, for things that may be drawn."""
    visualizer: int = 2000
    """Pictures in the visualizer's folder."""
    evaluation: int = 200
    """Records of each evaluation file."""
    pair_fraction: float = _PAIR_FRACTION
    """Share of scenes with two objects in training records; evaluation has 0.35 of them always."""

    @classmethod
    def only_evaluation(cls, count: int) -> WorldSizes:
        """No training records, and `count` in each evaluation file."""
        return cls(
            captions=0,
            vqa=0,
            text_vqa=0,
            text_to_image=0,
            edits=0,
            next_frames=0,
            facts=0,
            knowledge_prompts=0,
            visualizer=0,
            evaluation=count,
        )

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < 0:
                raise ValueError(f"{field.name}={getattr(self, field.name)} is negative; give 0 or more.")
        if self.pair_fraction > 1:
            raise ValueError(f"pair_fraction={self.pair_fraction} is a share: give at most 1.")
        if self.questions_per_image not in range(1, len(QUESTION_TYPES) + 1):
            raise ValueError(
                f"questions_per_image={self.questions_per_image} is not between 1 and {len(QUESTION_TYPES)}."
            )


@dataclass(frozen=True)
class WorldFiles:
    """Where :func:`write_dataset` put what."""

    image_folder: Path
    """Folder that the records' image paths are relative to."""
    stage1: Path
    """Captions."""
    stage2: Path
    """The mixture; each record names its `task`."""
    visualizer_folder: Path
    """PNG files of training scenes, held-out pairs included: the decoder may know how everything looks."""
    evaluation: dict[str, Path]
    """Files by name: ``vqa``, ``generation``, ``edit``, ``next_frame``, ``knowledge``, ``visualizer``.

    Beside the LLaVA fields a record has `task`; `type` and `answer` (vqa); `scene`, the scene that the answer picture
    must show, in the form of `Scene.to_dict` (all others); `split`, ``seen`` or ``held_out`` (generation).
    """


def write_dataset(folder: str | Path, *, seed: int = 0, sizes: WorldSizes | None = None) -> WorldFiles:
    """Write training and evaluation data; the same seed and sizes give the same bytes.

    Args:
        folder: created if missing; files of the same names are replaced.
        seed: of everything drawn.
        sizes: numbers of records, by default those of :class:`WorldSizes`.

    Returns:
        The paths.
    """
    folder = Path(folder)
    sizes = sizes or WorldSizes()
    writer = _Writer(folder / "images", seed)
    stage2 = [
        *writer.records("vqa", sizes.vqa, lambda rng: _vqa(rng, writer, sizes)),
        *writer.records("text_vqa", sizes.text_vqa, lambda rng: _text_vqa(rng, sizes)),
        *writer.records("text_to_image", sizes.text_to_image, lambda rng: _drawing(rng, writer, sizes.pair_fraction)),
        *writer.records("image_edit", sizes.edits, lambda rng: _edit(rng, writer, sizes.pair_fraction)),
        *writer.records("next_frame", sizes.next_frames, lambda rng: _next_frame(rng, writer, False)),
        *writer.records("facts", sizes.facts, _facts),
        *writer.records("knowledge", sizes.knowledge_prompts, lambda rng: _knowledge(rng, writer, True)),
    ]
    order = np.random.default_rng([seed, 0]).permutation(len(stage2))
    evaluation = {
        "vqa": writer.records("eval_vqa", sizes.evaluation, lambda rng: _vqa_test(rng, writer)),
        "generation": [
            *writer.records("eval_seen", sizes.evaluation, lambda rng: _drawing(rng, writer, reserved=True)),
            *writer.records("eval_held_out", sizes.evaluation, lambda rng: _held_out_drawing(rng, writer)),
        ],
        "edit": writer.records("eval_edit", sizes.evaluation, lambda rng: _edit(rng, writer, reserved=True)),
        "next_frame": writer.records("eval_next", sizes.evaluation, lambda rng: _next_frame(rng, writer, True)),
        "knowledge": writer.records("eval_knowledge", sizes.evaluation, lambda rng: _knowledge(rng, writer, False)),
        "visualizer": writer.records("eval_visualizer", sizes.evaluation, lambda rng: _picture(rng, writer)),
    }
    return WorldFiles(
        image_folder=writer.image_folder,
        stage1=_write_jsonl(
            folder / "stage1.jsonl",
            writer.records("captions", sizes.captions, lambda rng: _captioned(rng, writer, sizes.pair_fraction)),
        ),
        stage2=_write_jsonl(folder / "stage2.jsonl", (stage2[i] for i in order)),
        visualizer_folder=_write_visualizer_folder(folder / "visualizer", seed, sizes.visualizer),
        evaluation={name: _write_jsonl(folder / f"eval_{name}.jsonl", records) for name, records in evaluation.items()},
    )


class _Writer:
    """Draws records and saves their pictures; every record has a generator of its own, seeded by its place."""

    def __init__(self, image_folder: Path, seed: int) -> None:
        image_folder.mkdir(parents=True, exist_ok=True)
        self.image_folder = image_folder
        self.seed = seed
        self._name = ""
        self._count = 0

    def records(self, name: str, count: int, make: Callable[[np.random.Generator], dict]) -> list[dict]:
        """`count` records called ``{name}-{index}``."""
        found = []
        for index in Progress(range(count), f"writing {name}", unit="record", delay=2):
            self._name, self._count = f"{name}-{index:05d}", 0
            rng = np.random.default_rng([self.seed, 1, *name.encode(), index])
            found.append({"id": self._name, **make(rng)})
        return found

    def picture(self, scene: Scene, rng: np.random.Generator | None = None) -> str:
        """Save a picture of the record at hand; its path relative to the image folder."""
        path = f"{self._name}-{self._count}.png"
        self._count += 1
        render(scene, rng).save(self.image_folder / path)
        return path


def _turns(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [
        {"from": speaker, "value": text} for human, gpt in pairs for speaker, text in (("human", human), ("gpt", gpt))
    ]


def _captioned(rng: np.random.Generator, writer: _Writer, pair_fraction: float) -> dict:
    scene = sample_scene(rng, pair_fraction=pair_fraction)
    request = sentence(pick(rng, CAPTION_REQUESTS), rng)
    return {
        "task": "caption",
        "image": writer.picture(scene, rng),
        "conversations": _turns((f"<image>\n{request}", caption(scene, rng))),
    }


def _some_questions(scene: Scene, rng: np.random.Generator, count: int) -> list[tuple[str, str]]:
    found = questions(scene, rng)
    chosen = rng.permutation(len(found))[:count]
    return [found[i][1:] for i in chosen]


def _vqa(rng: np.random.Generator, writer: _Writer, sizes: WorldSizes) -> dict:
    scene = sample_scene(rng, pair_fraction=sizes.pair_fraction)
    (first, answer), *others = _some_questions(scene, rng, sizes.questions_per_image)
    return {
        "task": "vqa",
        "image": writer.picture(scene, rng),
        "conversations": _turns((f"<image>\n{first}", answer), *others),
    }


def _text_vqa(rng: np.random.Generator, sizes: WorldSizes) -> dict:
    scene = sample_scene(rng, pair_fraction=sizes.pair_fraction)
    (first, answer), *others = _some_questions(scene, rng, sizes.questions_per_image)
    return {"task": "text_vqa", "conversations": _turns((f"{caption(scene, rng)}\n{first}", answer), *others)}


def _vqa_test(rng: np.random.Generator, writer: _Writer) -> dict:
    wanted = pick(rng, QUESTION_TYPES)
    while True:
        scene = sample_scene(rng, reserved=True)
        found = {kind: (question, answer) for kind, question, answer in questions(scene, rng)}
        if wanted in found:
            break
    question, answer = found[wanted]
    return {
        "task": "vqa",
        "type": wanted,
        "answer": answer,
        "image": writer.picture(scene, rng),
        "conversations": _turns((f"<image>\n{question}", answer)),
    }


def _drawing_record(task: str, prompt: str, scene: Scene, writer: _Writer, **extra: str) -> dict:
    return {
        "task": task,
        **extra,
        "scene": scene.to_dict(),
        "image": writer.picture(scene),
        "conversations": _turns((prompt, "<image>")),
    }


def _drawing(
    rng: np.random.Generator, writer: _Writer, pair_fraction: float = _PAIR_FRACTION, *, reserved: bool = False
) -> dict:
    background = "grey" if rng.random() < 0.25 else "white"
    scene = sample_scene(
        rng, pair_fraction=pair_fraction, background=background, allow_held_out=False, reserved=reserved
    )
    extra = {"split": "seen"} if reserved else {}
    return _drawing_record("text_to_image", drawing_prompt(scene, rng), scene, writer, **extra)


def _held_out_drawing(rng: np.random.Generator, writer: _Writer) -> dict:
    """One object of a held-out pair, every pair equally often, in a scene of no training picture, inputs included."""
    wanted = pick(rng, sorted(HELD_OUT))
    while True:
        scene = sample_scene(rng, num_objects=1, background="white", reserved=True)
        if (scene.objects[0].color, scene.objects[0].shape) == wanted:
            return _drawing_record("text_to_image", drawing_prompt(scene, rng), scene, writer, split="held_out")


def _edit(
    rng: np.random.Generator, writer: _Writer, pair_fraction: float = _PAIR_FRACTION, *, reserved: bool = False
) -> dict:
    kind_wanted = pick(rng, EDIT_KINDS)
    while True:
        scene = sample_scene(rng, pair_fraction=pair_fraction, reserved=reserved)
        kind, instruction, changed = edit(scene, rng)
        if kind == kind_wanted and not changed.has_held_out and is_reserved(changed) == reserved:
            break
    return {
        "task": "image_edit",
        "type": kind,
        "scene": changed.to_dict(),
        "image": [writer.picture(scene, rng), writer.picture(changed)],
        "conversations": _turns((f"<image>\n{instruction}", "<image>")),
    }


def _next_frame(rng: np.random.Generator, writer: _Writer, reserved: bool) -> dict:
    while True:
        scene = sample_scene(rng, num_objects=1, allow_held_out=False, reserved=None)
        frames = next_frame(scene, rng)
        if is_reserved(frames[2]) if reserved else not any(map(is_reserved, frames)):
            break
    prompt = sentence(pick(rng, NEXT_FRAME_PROMPTS), rng)
    return {
        "task": "next_frame",
        "scene": frames[2].to_dict(),
        "image": [writer.picture(frames[0], rng), writer.picture(frames[1], rng), writer.picture(frames[2])],
        "conversations": _turns((f"<image>\n<image>\n{prompt}", "<image>")),
    }


def _facts(rng: np.random.Generator) -> dict:
    found = fact_questions(pick(rng, THINGS), rng)
    return {"task": "facts", "conversations": _turns(*(found[i] for i in rng.permutation(len(found))))}


def _knowledge(rng: np.random.Generator, writer: _Writer, drawn: bool) -> dict:
    while True:
        prompt, scene, _ = knowledge_prompt(rng, drawn=drawn)
        # What evaluation asks for is new by its thing, whatever its scene: too few scenes of this kind are reserved to
        # ask for every colour and shape. A training prompt must not show a reserved scene.
        if not drawn or not is_reserved(scene):
            return _drawing_record("knowledge", prompt, scene, writer)


def _picture(rng: np.random.Generator, writer: _Writer) -> dict:
    scene = sample_scene(rng, reserved=True)
    return {
        "task": "visualizer",
        "scene": scene.to_dict(),
        "image": writer.picture(scene),
        "conversations": _turns(("<image>", caption(scene, rng))),
    }


def _write_visualizer_folder(folder: Path, seed: int, count: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        rng = np.random.default_rng([seed, 2, index])
        render(sample_scene(rng)).save(folder / f"{index:05d}.png")
    return folder


def _write_jsonl(path: Path, records: Iterable[dict]) -> Path:
    with path.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    return path
