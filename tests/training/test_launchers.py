"""The same flags with every launcher: python -m, torchrun and accelerate launch."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest


pytestmark = pytest.mark.integration


SECONDS = 240
"""A guard against hangs, not a measurement."""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def launch(words: list[str], *, processes: int = 1) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        environment.pop(name, None)
    run = subprocess.run(
        words, env=environment, capture_output=True, text=True, timeout=SECONDS * processes, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run


def train_words(parts: Path, output_dir: Path) -> list[str]:
    """Stage 1 for one step of four samples, with the rate by the rule: 1e-3 × √(4 / 1) = 2e-3."""
    flags = {
        "model_name_or_path": parts / "llm",
        "vision_tower": parts / "tower",
        "num_image_tokens": 4,
        "tune_mm_mlp_adapter": True,
        "data_path": parts / "data.jsonl",
        "image_folder": parts / "images",
        "output_dir": output_dir,
        "learning_rate": "auto",
        "base_learning_rate": 1e-3,
        "base_batch_size": 1,
        "warmup_ratio": 0,
        "max_steps": 1,
        "packing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "bf16": False,
        "use_cpu": True,
    }
    return ["train", *(word for name, value in flags.items() for word in (f"--{name}", str(value)))]


def check(run: subprocess.CompletedProcess[str], output_dir: Path) -> None:
    assert run.stdout.count(f"stage 1 finished after 1 steps: {output_dir}") == 1
    assert "learning rate 0.002 = 0.001 × √(4 / 1)" in run.stderr
    history = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    assert history[0]["lr_mm_projector"] == pytest.approx(2e-3)
    assert (output_dir / "mm_projector.safetensors").is_file()


LAUNCHERS = {
    "python -m": [sys.executable, "-m", "metamorph"],
    "accelerate launch": [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--cpu", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
        *("-m", "metamorph"),
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_one_process(launcher: str, parts: Path, tmp_path: Path) -> None:
    words = [*train_words(parts, tmp_path), "--per_device_train_batch_size", "4"]
    check(launch([*LAUNCHERS[launcher], *words]), tmp_path)


@pytest.mark.slow
def test_torchrun(parts: Path, tmp_path: Path) -> None:
    """Two processes of one sample, twice in a step: the same four samples, one result, one report."""
    start = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
        *("--master-port", str(free_port()), "-m", "metamorph"),
    ]
    words = [*train_words(parts, tmp_path), "--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2"]
    check(launch([*start, *words], processes=2), tmp_path)


@pytest.mark.slow
def test_dry_run_of_two_processes_is_printed_once(parts: Path) -> None:
    start = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
        *("--master-port", str(free_port()), "-m", "metamorph", "train", "--dry-run"),
    ]
    words = ["--model_name_or_path", str(parts / "llm"), "--vision_tower", str(parts / "tower")]
    run = launch([*start, *words, "--num_image_tokens", "4", "--per_device_train_batch_size", "3"], processes=2)
    assert run.stdout.count("dry run: nothing is trained") == 1
    assert "global batch = 3 per GPU × 1 accumulation steps × 2 GPUs × 1 nodes = 6 rows" in run.stdout
