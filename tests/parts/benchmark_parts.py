"""A loader and metrics for tests of benchmarks, questions of the miniature world, and spec files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import yaml
from PIL import Image

from metamorph.evaluation.loaders import LOADERS
from metamorph.evaluation.loaders.base import Loader
from metamorph.evaluation.metrics import METRICS
from metamorph.evaluation.metrics.base import Metric, Tools
from metamorph.evaluation.samples import Answer, Sample
from metamorph.inference.answer_files import load_tokens
from metamorph.miniature.world.language import drawing_prompt, questions
from metamorph.miniature.world.render import render
from metamorph.miniature.world.scenes import sample_scene


def register() -> None:
    """Make the loader and the metrics known, also in the processes that a test starts."""
    LOADERS["lines"] = f"{__name__}:Lines"
    METRICS.update({name: f"{__name__}:{kind}" for name, kind in (("exact", "Exact"), ("drawn", "Drawn"))})


@dataclass(frozen=True)
class Lines(Loader):
    name: ClassVar[str] = "lines"
    kinds: tuple[str, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)
    shift: float = 0.0
    order: Literal["file", "reversed"] = "file"
    most: int | None = None

    def load(self, path: Path) -> Sequence[Sample]:
        records = [json.loads(line) for line in path.read_text().splitlines()]
        return [
            Sample(
                record["id"],
                {"question": record["question"]},
                record["answer"],
                tuple(str(path.parent / name) for name in record["images"]),
                categories={"type": record["type"]},
            )
            for record in records
        ]


@dataclass(frozen=True)
class Exact(Metric):
    """1 for the right word; `answered` only exists for answers that are not errors."""

    name: ClassVar[str] = "exact"
    headline: ClassVar[str] = "accuracy"
    needed: str = "question"

    def check(self, samples: Sequence[Sample]) -> None:
        if any(self.needed not in sample.fields for sample in samples):
            raise ValueError(f"the metric needs {self.needed}")

    def unit(self, sample: Sample) -> str:
        return sample.images[0] if sample.images else sample.id

    def score(self, samples: Sequence[Sample], answers: Sequence[Answer], tools: Tools) -> list[dict[str, float]]:
        tools.progress.update(len(samples))
        return [
            {
                "accuracy": float(answer.text.strip().lower() == sample.reference),
                **({} if answer.error else {"answered": float(bool(answer.text))}),
            }
            for sample, answer in zip(samples, answers, strict=True)
        ]

    def of_set(self, samples: Sequence[Sample], answers: Sequence[Answer], tools: Tools) -> dict[str, float]:
        return {"distinct": len({answer.text for answer in answers}) / len(answers)}


@dataclass(frozen=True)
class Drawn(Metric):
    """Images, means of their pixels, and norms of their visual tokens."""

    name: ClassVar[str] = "drawn"
    headline: ClassVar[str] = "images"
    needs_images: ClassVar[bool] = True
    needs_visual_tokens: ClassVar[bool] = True

    def score(self, samples: Sequence[Sample], answers: Sequence[Answer], tools: Tools) -> list[dict[str, float]]:
        return [
            {
                "images": float(len(answer.images)),
                "brightness": float(np.mean([np.asarray(Image.open(file)).mean() for file in answer.images])),
                "tokens": float(sum(load_tokens(file).norm().item() for file in answer.visual_tokens)),
            }
            for answer in answers
        ]


def write_questions(folder: Path, count: int = 12) -> Path:
    """Two questions about each of the images, `questions.jsonl`."""
    rng, records = np.random.default_rng(3), []
    while len(records) < count:
        scene, number = sample_scene(rng, reserved=True), len(records) // 2
        render(scene).save(folder / f"{number}.png")
        found = questions(scene, rng)
        for kind, question, answer in (found[index] for index in rng.permutation(len(found))[:2]):
            name = f"q{len(records)}"
            records.append(
                {"id": name, "question": question, "answer": answer, "type": kind, "images": [f"{number}.png"]}
            )
    return _write(folder / "questions.jsonl", records)


def write_drawings(folder: Path, count: int = 3) -> Path:
    """Prompts for images, `drawings.jsonl`."""
    rng = np.random.default_rng(4)
    prompts = [drawing_prompt(sample_scene(rng, reserved=True, background="white"), rng) for _ in range(count)]
    return _write(
        folder / "drawings.jsonl",
        [
            {"id": f"d{number}", "question": prompt, "answer": None, "type": "drawing", "images": []}
            for number, prompt in enumerate(prompts)
        ],
    )


def write_spec(file: Path, **changes: Any) -> Path:
    """A spec of the questions with other values of its keys; None leaves a key out."""
    content = {
        "data": {"loader": "lines"},
        "prompt": "{question}",
        "decoding": {"max_new_tokens": 16},
        "metric": {"name": "exact"},
    }
    content = {key: value for key, value in {**content, **changes}.items() if value is not None}
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    return file


def _write(file: Path, records: Sequence[Mapping[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return file
