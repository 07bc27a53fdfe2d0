"""Benchmarks during training: `--eval_specs` runs them, logs their figures, and changes nothing."""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import numpy as np
import pytest
import torch
from benchmark_parts import write_spec
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_parts import arguments

from metamorph.evaluation.benchmarks.run import run_spec
from metamorph.evaluation.benchmarks.spec import SpecChoice, read_spec
from metamorph.evaluation.metrics import METRICS
from metamorph.evaluation.metrics.base import Tools
from metamorph.evaluation.metrics.text import TextMetric
from metamorph.evaluation.samples import Answer, Sample
from metamorph.inference import Session
from metamorph.training.run import TrainResult, run_training


pytestmark = pytest.mark.integration

LORA = {"lora_enable": True, "lora_r": 4, "lora_dropout": 0.3}


@dataclass(frozen=True)
class Lengths(TextMetric):
    """Characters of the answers; judging moves every global random generator."""

    name: ClassVar[str] = "lengths"
    headline: ClassVar[str] = "length"

    def judge(self, text: str, right: Sequence[str]) -> float:
        return float(len(text))

    def score(self, samples: Sequence[Sample], answers: Sequence[Answer], tools: Tools) -> list[dict[str, float]]:
        torch.rand(3)
        np.random.rand(3)  # noqa: NPY002 - the global one
        random.random()
        return super().score(samples, answers, tools)


@dataclass(frozen=True)
class Shortness(Lengths):
    """The same, but the shortest are best."""

    name: ClassVar[str] = "shortness"
    lower_is_better: ClassVar[bool] = True


OWN = {kind.name: f"{__name__}:{kind.__name__}" for kind in (Lengths, Shortness)}


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    with patch.dict(METRICS, OWN):
        yield


@pytest.fixture(scope="module")
def specs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`facts.yaml`, `short.yaml` and `nowhere.yaml`, with a table of questions next to them."""
    folder = tmp_path_factory.mktemp("specs")
    rows = [{"question": f"What is {number}?", "answer": "A picture."} for number in range(6)]
    (folder / "facts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"loader": "table", "path": "facts.jsonl", "question": "question", "answer": "answer"}
    for name, metric in (("facts", "lengths"), ("short", "shortness")):
        write_spec(folder / f"{name}.yaml", data=data, metric={"name": metric})
    write_spec(folder / "nowhere.yaml", data={**data, "path": "none.jsonl"}, metric={"name": "lengths"})
    return folder


def train(parts: Path, output_dir: Path, **flags: Any) -> TrainResult:
    defaults = {"from_scratch_connector": True, "warmup_ratio": 0, "max_steps": 4, "learning_rate": 1e-2}
    return run_training(*arguments(parts, output_dir, stage=2, **{**defaults, **flags}))


def logged(result: TrainResult, name: str) -> list[float]:
    return [line[name] for line in result.log_history if name in line]


@pytest.fixture(scope="module")
def measured(parts: Path, specs: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """A run with two benchmarks, the second of its own records; dropout makes random generators matter."""
    with patch.dict(METRICS, OWN):
        return train(
            parts,
            tmp_path_factory.mktemp("measured"),
            eval_specs=[f"{specs / 'facts.yaml'}:3", f"answers={parts / 'images.yaml'}"],
            eval_strategy="steps",
            eval_steps=2,
            eval_on_start=True,
            report_to="tensorboard",
            **LORA,
        )


@pytest.fixture(scope="module", autouse=True)
def _mixture(parts: Path) -> None:
    (parts / "images.yaml").write_text("- {path: data.jsonl, image_folder: images}\n")


def test_figures_are_logged(measured: TrainResult) -> None:
    lines = [line for line in measured.log_history if "eval_facts_length" in line]
    assert [line["step"] for line in lines] == [0, 2, 4]
    assert all(0 <= line["eval_answers_exact_match"] <= 1 for line in lines)
    assert len({line["eval_answers_cosine_baseline"] for line in lines}) == 1  # of the frozen tower alone
    events = EventAccumulator(str(Path(measured.output_dir) / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("eval/facts_length")] == [0, 2, 4]
    folder = Path(measured.output_dir) / "eval" / "facts" / "step-4"
    assert len(json.loads((folder / "result.json").read_text())["answers"]) == 3


def test_measuring_changes_nothing(measured: TrainResult, parts: Path, tmp_path: Path) -> None:
    plain = train(parts, tmp_path, **LORA)
    assert logged(plain, "loss") == logged(measured, "loss")
    weights = measured.model.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in plain.model.state_dict().items())


def test_the_figures_are_those_of_the_command(measured: TrainResult, specs: Path, parts: Path, tmp_path: Path) -> None:
    session = Session(measured.model.eval(), measured.processor)
    for name, path in ((str(specs / "facts.yaml"), None), ("answers", parts / "images.yaml")):
        spec, limit = read_spec(name), 3 if path is None else None
        options: dict[str, Any] = {"data_path": path, "limit": limit, "device": torch.device("cpu")}
        result = run_spec(spec, "none", None, tmp_path / spec.name, lambda: session, **options)
        for figure, values in result["summary"].items():
            last = logged(measured, f"eval_{spec.name}_{figure}")[-1]
            assert last == pytest.approx(values["value"], rel=1e-4), figure


@pytest.mark.parametrize("name", ["facts", "short"])
def test_the_best_checkpoint_by_a_benchmark(name: str, parts: Path, specs: Path, tmp_path: Path) -> None:
    """The longest answers are best, or the shortest."""
    result = train(
        parts,
        tmp_path,
        eval_specs=[f"{specs / name}.yaml"],
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model=f"eval_{name}_length",
    )
    lengths = logged(result, f"eval_{name}_length")
    assert len(lengths) == 4
    best = (min if name == "short" else max)(lengths)
    assert best != (max if name == "short" else min)(lengths)
    spec = read_spec(str(specs / f"{name}.yaml"))
    session = Session(result.model.eval(), result.processor)
    end = run_spec(spec, "none", None, tmp_path / "end", lambda: session, device=torch.device("cpu"))
    assert end["summary"]["length"]["value"] == pytest.approx(best)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"eval_specs": ["mmvpp=x"]}, "--eval_specs mmvpp=x.*did you mean 'mmvp'"),
    ({"eval_specs": ["mmvp=none"]}, "--eval_specs mmvp=none.*none does not exist"),
    ({"eval_specs": ["SPECS/nowhere.yaml"]}, "nowhere.yaml.*none.jsonl does not exist"),
    ({"eval_specs": ["SPECS/facts.yaml:0"]}, "asks for no samples"),
    ({"eval_specs": ["SPECS/facts.yaml", "SPECS/facts.yaml:2"]}, "has two benchmarks named facts"),
    ({"eval_specs": ["geneval=SPECS/facts.jsonl"]}, "geneval judges images: give the --eval_visualizer"),
    ({"eval_specs": ["SPECS/facts.yaml"], "eval_visualizer": "mini"}, "has no effect: --eval_specs judge text"),
    ({"eval_visualizer": "mini", "eval_strategy": "no"}, "--eval_visualizer mini needs --eval_specs"),
    ({"eval_specs": ["SPECS/facts.yaml"], "eval_strategy": "no"}, "is never read with --eval_strategy no"),
    ({"eval_specs": ["SPECS/facts.yaml"], "metric_for_best_model": "loss"}, "Use one of eval_facts_length"),
]


@pytest.mark.parametrize(("flags", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_bad_flags_fail_before_the_model_is_loaded(
    flags: dict[str, Any], message: str, parts: Path, specs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("metamorph.training.run.load_for_engine", None)
    given = [text.replace("SPECS", str(specs)) for text in flags.get("eval_specs", [])]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(parts, tmp_path, **{"eval_strategy": "steps", "eval_steps": 1, **flags, "eval_specs": given or None})


def test_divided_weights_are_refused(parts: Path, specs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metamorph.training.reporting.benchmarks.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match="needs all weights on each device"):
        train(parts, tmp_path, eval_specs=[str(specs / "facts.yaml")], eval_strategy="epoch")


def test_a_choice_is_read(specs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(specs)
    for folder in ("data", "data:of"):
        (specs / folder / "MMVP").mkdir(parents=True)
    for text, path, limit in (
        ("facts.yaml", None, None),
        ("facts.yaml:7", None, 7),
        ("mmvp=data/MMVP:100", Path("data/MMVP"), 100),
        ("mmvp=data:of/MMVP", Path("data:of/MMVP"), None),
    ):
        choice = SpecChoice.parse(text)
        assert (choice.path, choice.limit) == (path, limit)
