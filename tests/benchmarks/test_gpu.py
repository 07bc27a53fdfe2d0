"""`make gpu` without a GPU: which parts it has, that they resume, and that a benchmark runs with tiny sizes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch


ROOT = Path(__file__).parents[2]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import gpu

    return gpu


def test_every_test_of_a_gpu_is_a_part(gpu: ModuleType) -> None:
    """A test that skips without a GPU, but is not marked, would never run."""
    files = {file.relative_to(ROOT).as_posix(): file.read_text() for file in (ROOT / "tests").rglob("test_*.py")}
    needs_gpu = {name for name, text in files.items() if "skipif(" in text and "torch.cuda." in text}
    assert needs_gpu - {Path(__file__).relative_to(ROOT).as_posix()} == {
        name for name in gpu.parts(small=True) if name.startswith("tests/")
    }


def test_the_section_has_its_place(gpu: ModuleType) -> None:
    before, _, rest = gpu.RESULTS.read_text(encoding="utf-8").partition(gpu.BEGIN)
    assert before
    assert gpu.END in rest


def test_parts_that_are_done_are_not_run_again(gpu: ModuleType, tmp_path: Path) -> None:
    log, file = tmp_path / "log", tmp_path / "out" / "gpu.json"

    def command(name: str, output: str, status: int = 0) -> list[str]:
        code = f"open({str(log)!r}, 'a').write({name + ' '!r}); print({output!r}); exit({status})"
        return [sys.executable, "-c", code]

    commands = {
        "tests/a.py": command("tests/a.py", "1 passed"),
        "train-0": command("train-0", '{"ms": 1.23456}'),
        "train-1": command("train-1", "1 failed", status=3),
    }

    def run(seconds: float = 900) -> tuple[dict[str, Any], list[str]]:
        log.write_text("")
        return gpu.run_parts(commands, file, seconds), log.read_text().split()

    assert run(seconds=gpu.LEAST_SECONDS - 1) == ({}, [])
    found, ran = run()
    assert ran == list(commands)
    assert [part["status"] for part in found.values()] == ["ok", "ok", "failed with exit code 3"]
    assert run()[1] == ["train-1"]
    assert found["tests/a.py"]["date"] in (text := gpu.section(found))
    assert "| 1 passed |" in text
    assert "| 1.235 |" in text
    assert "| failed with exit code 3: 1 failed |" in text

    # One part of other code does not count, whatever else was run.
    kept = json.loads(file.read_text())
    kept["train-0"]["code"] = "other"
    file.write_text(json.dumps(kept))
    assert run()[1] == ["train-0", "train-1"]


def test_a_part_that_is_too_long_leaves_no_process(gpu: ModuleType) -> None:
    """The result comes when all processes have closed their output."""
    part = gpu.run(["sh", "-c", "sleep 300 & wait"], 1.0)
    assert part["status"] == "stopped after 1 s"
    assert part["seconds"] < 100


@pytest.mark.parametrize("name", ["train-3", "visualizer-1", "drawing-3"])
def test_out_of_memory_is_a_row_with_its_case(name: str, gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    import train_gpu
    import visualizer_gpu

    def fail(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(train_gpu, "build_model", fail)
    monkeypatch.setattr(visualizer_gpu, "build", fail)
    row = gpu.measure(name, small=True)
    case = train_gpu.describe(train_gpu.CASES[3]) if name == "train-3" else {"images": 16, "compiled": True}
    assert row == case | {"result": "out of memory"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train-0", "visualizer-0", "drawing-0"])
def test_a_small_benchmark_runs(name: str, gpu: ModuleType) -> None:
    row = gpu.measure(name, small=True)
    measured = {column: value for column, value in row.items() if isinstance(value, float)}
    assert measured.pop("peak GB") == 0 or torch.cuda.is_available()
    assert measured
    assert all(value > 0 for value in measured.values())
