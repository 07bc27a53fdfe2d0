"""Runs of benchmarks: the same command gives the same result, resumed, in batches or in processes as well."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from benchmark_parts import register, write_drawings, write_questions, write_spec
from PIL import Image

import metamorph
from metamorph import cli
from metamorph.evaluation.benchmarks.result import RESULT_FILE, VOLATILE, hash_sample, identify
from metamorph.evaluation.benchmarks.run import run_spec
from metamorph.evaluation.benchmarks.spec import read_spec
from metamorph.evaluation.loaders import LOADERS
from metamorph.evaluation.metrics import METRICS
from metamorph.inference import Session
from metamorph.mini import asset_path
from metamorph.models.adapters import ADAPTER_FILE


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    with patch.dict(LOADERS), patch.dict(METRICS):
        register()
        yield


@pytest.fixture(scope="module")
def session() -> Session:
    return metamorph.load("mini", "mini", device="cpu", dtype=torch.float32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Questions with a spec, and prompts for images with another."""
    data = write_questions(tmp_path)
    write_spec(tmp_path / "asks.yaml", data={"loader": "lines", "path": data.name})
    data = write_drawings(tmp_path)
    drawing = {"steps": 2, "draw": True, "num_images": 2}
    changes = {"data": {"loader": "lines", "path": data.name}, "decoding": drawing, "metric": {"name": "drawn"}}
    write_spec(tmp_path / "draws.yaml", **changes)
    return tmp_path


def run(
    session: Session | Callable[[], Session], folder: Path, name: str, spec: str = "asks", **options: Any
) -> dict[str, Any]:
    visualizer = "mini" if spec == "draws" else None
    made = read_spec(str(folder / f"{spec}.yaml"))
    device = torch.device("cpu")
    opened = session if callable(session) else lambda: session
    return run_spec(made, "mini", visualizer, folder / name, opened, device=device, **options)


def read(folder: Path, *without: str) -> dict[str, Any]:
    result = json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
    return {name: value for name, value in result.items() if name not in (*VOLATILE, *without)}


def test_the_same_command_gives_the_same_result(session, folder: Path) -> None:
    """Also with other batches, and from a part of its answers; judging again does not open the model."""
    result = run(session, folder, "one")
    assert read(folder / "one") == {name: value for name, value in result.items() if name not in VOLATILE}
    run(session, folder, "alone", batch_size=1)
    assert read(folder / "alone") == read(folder / "one")
    # After a kill amid the sixth answer.
    lines = (folder / "one" / "answers.jsonl").read_bytes().splitlines(keepends=True)
    run(session, folder, "cut")
    (folder / "cut" / "answers.jsonl").write_bytes(b"".join(lines[:5]) + lines[5][:20])
    (folder / "cut" / RESULT_FILE).unlink()
    run(session, folder, "cut")
    assert read(folder / "cut") == read(folder / "one")

    def fail() -> Session:
        raise AssertionError("the model is not needed")

    again = run(fail, folder, "one")
    assert {**again, "date": ""} == {**result, "date": ""}


def test_a_result_says_what_decided_it(session, folder: Path) -> None:
    lines = (folder / "questions.jsonl").read_text().splitlines(keepends=True)
    wrong = [json.dumps({**json.loads(line), "answer": "no such word"}) + "\n" for line in lines[:3]]
    (folder / "questions.jsonl").write_text("".join([*wrong, *lines[3:]]))
    result = run(session, folder, "one")
    right = [answer for answer in result["answers"] if answer["text"].strip().lower() == answer["reference"]]
    assert len(right) >= 7  # mini is good at this
    summary = result["summary"]
    assert summary["accuracy"]["value"] == len(right) / 12
    assert summary["accuracy"]["low"] < len(right) / 12 < summary["accuracy"]["high"] <= 1
    assert summary["accuracy"]["n"] == summary["answered"]["n"] == 12
    assert "low" not in summary["distinct"]
    kinds = {answer["categories"]["type"] for answer in result["answers"]}
    assert result["categories"]["type"].keys() == kinds
    assert sum(found["accuracy"]["n"] for found in result["categories"]["type"].values()) == 12
    assert result["spec"]["content"]["prompt"] == "{question}"
    assert result["model"] == identify(str(asset_path("mini") / "model"), "model") | {"name": "mini"}
    assert result["versions"]["torch"] == torch.__version__.partition("+")[0] or result["versions"]["torch"]
    assert result["answers"][0].keys() >= {"id", "text", "images", "scores", "categories", "error", "reference"}
    table = (folder / "one" / "table.md").read_text(encoding="utf-8")
    assert f"| accuracy | {len(right) / 12:.4f} |" in table
    assert re.search(r"\| accuracy, type \w+ \|", table)


def test_hashes_change_with_what_they_identify(session, folder: Path) -> None:
    spec = read_spec(str(folder / "asks.yaml"))
    sample = spec.load()[0]
    before = hash_sample(sample)
    for change in ({"reference": "x"}, {"fields": {"question": "x"}}, {"images": ()}):
        assert hash_sample(replace(sample, **change)) != before
    Image.new("RGB", (8, 8)).save(sample.images[0])
    assert hash_sample(sample) != before
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    own = identify(str(model), "model")["sha256"]
    for of_training in ("checkpoint-3", "eval", "samples"):
        (model / of_training).mkdir()
        (model / of_training / "config.json").write_text("{}")
    assert identify(str(model), "model")["sha256"] == own  # checkpoints of its training are not the model
    (model / "chat_template.jinja").write_text("x")
    assert identify(str(model), "model")["sha256"] != own
    adapter = folder / "adapter"
    adapter.mkdir()
    (adapter / ADAPTER_FILE).write_text(json.dumps({"language_model": str(model), "vision_tower": "mini-siglip"}))
    base = identify(str(adapter), "model")["base"]
    assert base["model"] == identify(str(model), "model")
    assert len(base["tower"]["sha256"]) == 64


def test_a_limit_gives_the_answers_of_a_full_run(session, folder: Path) -> None:
    """Images, too: their noise does not depend on which other samples there are."""
    for spec in ("asks", "draws"):
        whole = run(session, folder, f"whole-{spec}", spec)
        part = run(session, folder, f"part-{spec}", spec, limit=2)
        assert len(part["answers"]) == 2
        assert part["data"]["limit"] == 2
        ids = [answer["id"] for answer in part["answers"]]
        same = [answer for answer in whole["answers"] if answer["id"] in ids]
        assert [answer["scores"] for answer in part["answers"]] == [
            {name: pytest.approx(value, rel=1e-3) for name, value in answer["scores"].items()} for answer in same
        ]


def test_a_metric_gets_images_and_visual_tokens(session, folder: Path) -> None:
    result = run(session, folder, "drawn", "draws")
    for answer in result["answers"]:
        assert answer["scores"]["images"] == 2
        assert answer["scores"]["tokens"] > 1
        assert all((folder / "drawn" / name).is_file() for name in answer["images"])
    prompts = [json.loads(line) for line in (folder / "drawn" / "prompts.jsonl").read_text().splitlines()]
    assert [prompt["seed"] for prompt in prompts] == [0, 2, 4]  # two drawings each


def test_results_of_something_else_are_kept(session, folder: Path) -> None:
    run(session, folder, "one")
    files = {name: (folder / "one" / name).read_bytes() for name in ("prompts.jsonl", "answers.jsonl", RESULT_FILE)}
    with pytest.raises(ValueError, match="holds results of another data, prompt or --limit: give another --output-dir"):
        run(session, folder, "one", limit=3)
    assert {name: (folder / "one" / name).read_bytes() for name in files} == files
    write_spec(
        folder / "asks.yaml", data={"loader": "lines", "path": "questions.jsonl"}, decoding={"max_new_tokens": 9}
    )
    with pytest.raises(ValueError, match="results of max_new_tokens of asks 16, which is now 9"):
        run(session, folder, "one")
    assert len(run(session, folder, "one", overwrite=True)["answers"]) == 12

    def stop() -> Session:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(stop, folder, "one", spec="asks", limit=2, overwrite=True)
    assert not (folder / "one" / RESULT_FILE).exists()  # it was of other answers


def test_an_answer_that_is_an_error_counts_as_wrong(session, folder: Path) -> None:
    (folder / "0.png").unlink()
    result = run(session, folder, "one")
    assert result["errors"] == 2
    assert "there is no image file" in result["answers"][0]["error"]
    assert result["answers"][0]["scores"] == {"accuracy": 0}
    assert (result["summary"]["accuracy"]["n"], result["summary"]["answered"]["n"]) == (12, 10)
    # Once it is there its answers are due; the others are not passed off as answers to these data.
    Image.new("RGB", (64, 64), "red").save(folder / "0.png")
    with pytest.raises(ValueError, match=r"holds results of another content of images or videos: give .* --overwrite"):
        run(session, folder, "one")
    assert not (folder / "one" / "prompts.partial").exists()
    assert run(session, folder, "one", overwrite=True)["errors"] == 0


def test_right_answers_may_change_and_must_give_finite_scores(session, folder: Path) -> None:
    run(session, folder, "one")
    data = folder / "questions.jsonl"
    records = [json.loads(line) | {"answer": "no such word"} for line in data.read_text().splitlines()]
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert run(session, folder, "one")["summary"]["accuracy"]["value"] == 0

    def score(*_: Any) -> list[dict[str, float]]:
        return [{"accuracy": float("nan")}] * 12

    with (
        patch("benchmark_parts.Exact.score", score),
        pytest.raises(ValueError, match="asks: accuracy of sample q0 is nan"),
    ):
        run(session, folder, "one")


FLAGS = [
    ("asks", ["--visualizer", "mini"], "--visualizer mini has no effect: asks judges text"),
    ("draws", [], "draws judges images: give the --visualizer that draws them"),
    ("asks", ["--data-path", "none"], "none does not exist: give the data of asks as --data-path"),
    ("asks", ["--model", "out/none"], "--model out/none"),
    ("asks", ["--limit", "0"], "--limit 0 must be at least 1"),
    ("small", ["--visualizer", "mini"], "max_new_tokens of small 3 has no room for an image"),
    ("needy", [], "the metric needs options"),
]


@pytest.mark.parametrize(("spec", "flags", "message"), FLAGS, ids=[message[:40] for *_, message in FLAGS])
def test_bad_flags_fail_before_the_model_is_loaded(
    spec: str, flags: list[str], message: str, folder: Path, capsys, monkeypatch
) -> None:
    data = {"data": {"loader": "lines", "path": "questions.jsonl"}}
    write_spec(folder / "small.yaml", **data, decoding={"max_new_tokens": 3}, metric={"name": "drawn"})
    write_spec(folder / "needy.yaml", **data, metric={"name": "exact", "needed": "options"})
    monkeypatch.chdir(folder)
    monkeypatch.setattr("metamorph.inference.session.open_session", None)
    assert cli.main(["evaluate", f"{spec}.yaml", "--model", "mini", *flags]) == 2
    assert message in capsys.readouterr().err
    assert not list(folder.glob("evaluation/*/answers.jsonl"))


COMMAND = ["evaluate", "asks.yaml", "--model", "mini", "--dtype", "float32"]


def start(folder: Path, launcher: list[str], *flags: str) -> subprocess.Popen[str]:
    worker = str(Path(__file__).with_name("evaluate_worker.py"))
    words = [sys.executable, *launcher, worker, *COMMAND[1:], *flags]
    paths = [str(Path(__file__).parents[1] / "parts"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.Popen(words, cwd=folder, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.fixture
def once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The result of the command without incident."""
    monkeypatch.chdir(folder)
    assert cli.main([*COMMAND, "--output-dir", "once"]) == 0
    assert (folder / "once" / "plot.png").is_file()
    return read(folder / "once")


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_give_the_result_of_one(once: dict[str, Any], folder: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = start(folder, launcher, "--output-dir", "two", "--batch-size", "2")
    errors = process.communicate(timeout=300)[1]
    assert process.returncode == 0, errors
    assert read(folder / "two") == once


@pytest.mark.slow
def test_a_killed_command_continues(once: dict[str, Any], folder: Path) -> None:
    """SIGKILL while it answers; the lock that it leaves is taken over."""
    process = start(folder, [], "--output-dir", "killed", "--batch-size", "1")
    answers = folder / "killed" / "answers.jsonl"
    try:
        until = time.monotonic() + 120
        while not answers.exists() or answers.read_text().count("\n") < 2:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < until
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    before = answers.read_bytes()
    assert not (folder / "killed" / RESULT_FILE).exists()
    assert cli.main([*COMMAND, "--output-dir", "killed"]) == 0
    assert answers.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    assert read(folder / "killed") == once
