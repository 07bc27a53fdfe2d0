"""Long commands where stderr is no terminal: what a log shows, and what stays in the files of the run."""

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from training_parts import NUM_IMAGE_TOKENS, make_records
from transformers import LlamaConfig, SiglipConfig
from visualization_parts import RESOLUTION, random_images, write_tiny_diffusion, write_tiny_tower

from metamorph import cli
from metamorph.runs.progress import Progress


pytestmark = pytest.mark.integration

SIX_FIELDS = re.compile(
    r"step +(\d+)/\d+ · epoch +[\d.]+ · loss +[\d.]+ · lr \d\.\d\de[+-]\d\d · +[\d,.]+ (?:tokens|samples)/s · .+ left"
)
Run = Callable[..., list[str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Run:
    """Runs a command whose lines are due from the start; returns them."""
    monkeypatch.setattr(Progress, "first_seconds", 0.0)
    monkeypatch.setattr(Progress, "interval_seconds", 0.1)
    monkeypatch.setattr(logging.getLogger(), "handlers", [caplog.handler])

    def run(*words: object) -> list[str]:
        caplog.clear()
        assert cli.main([str(word) for word in words]) == 0
        return caplog.messages

    return run


def test_training_logs_six_fields_and_keeps_all_values(parts: Path, tmp_path: Path, run: Run, capfd) -> None:
    """And so do the commands that check its data, cache its features and measure its result."""
    make_records(tmp_path, 4)
    towers = ["--vision_tower", parts / "tower", "--num_image_tokens", NUM_IMAGE_TOKENS]
    data = ["--data_path", parts / "data.jsonl", "--image_folder", parts / "images"]
    model = ["--model_name_or_path", parts / "llm", *towers]
    schedule = ["--max_steps", 4, "--logging_steps", 2, "--per_device_train_batch_size", 2, "--learning_rate", 1e-2]
    schedule += ["--eval_data_path", tmp_path / "data.jsonl", "--eval_image_folder", tmp_path / "images"]
    schedule += ["--eval_strategy", "steps", "--eval_steps", 4, "--save_strategy", "no", "--peak_tflops", 1]
    schedule += ["--from_scratch_connector", True]
    log = run("train", *model, *data, *schedule, "--output_dir", tmp_path / "run", "--bf16", False)
    fields = [match[1] for match in map(SIX_FIELDS.fullmatch, log) if match]
    assert fields == ["2", "4"]
    assert any(re.fullmatch(r"stage 2 · step \d/4( · loss [\d.]+)?( · \d+ s left)?", line) for line in log)
    assert re.fullmatch(r"stage 2 · step 4/4 · loss [\d.]+ · took \d+ s", log[-2])
    assert any(line.startswith("evaluation · batch ") for line in log)
    assert any(line.startswith("validation after step 4 · loss ") for line in log)
    assert capfd.readouterr().out == f"stage 2 finished after 4 steps: {tmp_path / 'run'}\n"
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    entries = [entry for entry in history if "loss" in entry]
    assert [entry["step"] for entry in entries] == [2, 4]
    kept = {
        "text_loss",
        "visual_loss",
        "visual_cosine",
        "grad_norm_vision_head",
        "data_wait_share",
        "tokens_seen",
        "mfu",
    }
    assert all(kept <= set(entry) for entry in entries)

    log = run("evaluate", "loss", "--model", tmp_path / "run", *data, "--cpu")
    assert log[-1].startswith("evaluation · batch 2/2 · took ")
    words = [parts / "data.jsonl", "--image-folder", parts / "images", "--output-dir", tmp_path / "report"]
    words += ["--model_name_or_path", parts / "llm", "--num_image_tokens", NUM_IMAGE_TOKENS]
    log = run("data", "check", *words, "--workers", 0)
    assert any(line.startswith("checking records · record 12/12 · took ") for line in log)
    model += ["--tune_mm_mlp_adapter", True]
    log = run("data", "cache-features", *data, *model, "--feature_cache", tmp_path / "cache", "--use_cpu", True)
    assert any(line.startswith("encoding images · image 12/12 · took ") for line in log)


def test_the_visualizer_logs_six_fields(tmp_path: Path, run: Run) -> None:
    (tmp_path / "pictures").mkdir()
    for number, image in enumerate(random_images(6)):
        image.save(tmp_path / "pictures" / f"{number}.png")
    tower = write_tiny_tower(tmp_path / "tower")
    diffusion = write_tiny_diffusion(tmp_path / "sd", "epsilon")
    parts = ["--vision_tower", tower, "--pretrained_model_name_or_path", diffusion, "--resolution", RESOLUTION]
    sizes = ["--num_tokens", 4, "--num_query_tokens", 5, "--hidden_dim", 16, "--num_heads", 2]
    steps = ["--training_steps", 4, "--logging_steps", 2, "--batch_size", 2, "--lr_warmup_steps", 0, "--save_step", 0]
    folders = ["--image_folder", tmp_path / "pictures", "--output_dir", tmp_path / "run"]
    log = run("train-visualizer", *parts, *sizes, *steps, *folders)
    assert [match[1] for match in map(SIX_FIELDS.fullmatch, log) if match] == ["2", "4"]
    assert any(re.fullmatch(r"visualizer · step 4/4 · loss [\d.]+ · took \d+ s", line) for line in log)
    words = ["--visualizer", tmp_path / "run", "--vision_tower", tower, "--images", tmp_path / "pictures", "--steps", 1]
    log = run("evaluate", "visualizer", *words, "--output_dir", tmp_path / "measured")
    assert log[-1].startswith("drawing · image 6/6 · took ")


@pytest.mark.parametrize(
    ("given", "seen"),
    [
        ({}, {"OMP_WAIT_POLICY": "PASSIVE"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
        ({"GOMP_SPINCOUNT": "1000"}, {"GOMP_SPINCOUNT": "1000"}),
        ({"KMP_BLOCKTIME": "1000"}, {"KMP_BLOCKTIME": "1000"}),
    ],
)
def test_idle_threads_sleep_unless_told_otherwise(given: dict[str, str], seen: dict[str, str]) -> None:
    """OpenMP itself says what it has read when PyTorch is imported."""
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    code = (
        "import sys, os; from metamorph import cli; cli.main(['lr', '--batch', '768']);"
        "assert 'torch' not in sys.modules; import torch;"
        f"print({{name: os.environ[name] for name in {names} if name in os.environ}})"
    )
    environment |= {**given, "OMP_DISPLAY_ENV": "true"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.splitlines()[-1] == str(seen)
    if "OMP_WAIT_POLICY" in seen and "OMP_WAIT_POLICY" in done.stderr:
        assert f"OMP_WAIT_POLICY = '{seen['OMP_WAIT_POLICY']}'" in done.stderr


def test_harmless_warnings_of_libraries_are_silenced(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers warns about the defaults of every SigLIP's text tower; other warnings are still logged."""
    for name in ("transformers", "DeepSpeed"):  # earlier tests of this process may have silenced Transformers
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
        caplog.set_level("WARNING", logger=name)
    cli.main(["lr", "--batch", "768"])
    SiglipConfig()
    logging.getLogger("DeepSpeed").warning("Setting accelerator to CPU. If you have GPU or other accelerator, …")
    assert not caplog.messages
    LlamaConfig(vocab_size=100, bos_token_id=1, eos_token_id=200)
    logging.getLogger("DeepSpeed").warning("something else")
    assert "Model config: eos_token_id must be" in caplog.messages[0]
    assert caplog.messages[-1] == "something else"
