"""Two processes: a signal to one of them in the middle of a step, and what the resumed run makes of it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from packing_parts import recorded
from preemption_parts import CASES, FLAGS
from safetensors.torch import load_file
from training_parts import arguments, logged, make_language_model, make_records, make_vision_tower

from metamorph.models.connector import CONNECTOR_FILE
from metamorph.runs.checkpoint_files import CheckpointError
from metamorph.runs.preemption import MARKER_FILE, PREEMPTED
from metamorph.training.run import run_training


pytestmark = [pytest.mark.distributed, pytest.mark.slow]

NUM_SAMPLES = 13
TIMEOUT = 240
LAUNCH = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
WORKER = str(Path(__file__).with_name("preemption_worker.py"))


def environment() -> dict[str, str]:
    tests = Path(__file__).parent.parent
    paths = [str(tests / "parts"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(paths)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parts, data, and all that two processes have left of the cases."""
    folder = tmp_path_factory.mktemp("preemption")
    make_language_model(folder / "llm")
    make_vision_tower(folder / "tower")
    make_records(folder, NUM_SAMPLES)
    done = subprocess.run(
        [*LAUNCH, WORKER, str(folder)], env=environment(), timeout=TIMEOUT, capture_output=True, text=True
    )
    assert (folder / "rank-1.json").is_file(), done.stderr[-5000:]
    assert done.returncode == 1  # torchrun's, whatever the status of its workers; that is why there is a marker
    return folder


def test_a_folder_in_use_is_refused_on_all_processes(folder: Path) -> None:
    messages = [(folder / f"refused-{rank}.txt").read_text() for rank in (0, 1)]
    assert messages[0] == messages[1]
    assert "held is used by another run: host " in messages[0]


@pytest.mark.parametrize("case", CASES)
def test_r25_a_preempted_run_resumes_as_if_nothing_had_happened(folder: Path, case: str) -> None:
    ranks = [json.loads((folder / f"rank-{rank}.json").read_text())[case] for rank in range(2)]
    for seen in ranks:
        assert seen["status"] == PREEMPTED
        assert {**seen["marker"], "time": 0} == {"step": 3, "checkpoint": "checkpoint-3", "signal": None, "time": 0}
        assert seen["first"] == seen["uninterrupted"][:3]  # one got the signal, both stopped
        assert seen["rest"] == seen["uninterrupted"][3:]
        assert seen["resumed_losses"] == pytest.approx(seen["losses"], abs=1e-5)
        assert seen["difference"] < 1e-6


@pytest.mark.parametrize(("name", "starts"), [("SIGKILL", 2), ("SIGUSR1", 1)])
def test_torchrun_restarts_a_run_that_crashed_but_not_a_preempted_one(folder: Path, name: str, starts: int) -> None:
    command = [*LAUNCH, "--max-restarts", "1", WORKER, str(folder), name]
    env = environment() | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # as launch.sh does
    done = subprocess.run(command, env=env, timeout=TIMEOUT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    assert len(list(folder.glob(f"{name}-start-*-0"))) == starts
    assert (folder / name / MARKER_FILE).exists() == (name == "SIGUSR1")
    if name == "SIGUSR1":
        assert (folder / name / "checkpoint-3").is_dir()
        return
    for rank in range(2):
        expected = json.loads((folder / f"rank-{rank}.json").read_text())["stage1"]
        seen = json.loads((folder / f"{name}-{rank}.json").read_text())
        assert seen["steps"] == expected["uninterrupted"][2:]  # from the checkpoint of the second step
        assert seen["losses"] == pytest.approx(expected["losses"], abs=1e-5)
    weights, plain = (load_file(path / CONNECTOR_FILE) for path in (folder / name, folder / "stage1" / "uninterrupted"))
    assert all(torch.allclose(weights[key], value, rtol=0, atol=1e-6) for key, value in plain.items())


def test_one_process_resumes_two_with_the_remaining_samples(folder: Path, tmp_path: Path) -> None:
    ranks = [json.loads((folder / f"rank-{rank}.json").read_text())["stage1"] for rank in range(2)]
    shutil.copytree(folder / "stage1" / "cut" / "checkpoint-3", tmp_path / "checkpoint-3")
    flags: dict[str, Any] = {**FLAGS, **CASES["stage1"], "max_steps": -1, "num_train_epochs": 2}

    # The same rows in a step: the very same steps.
    same = {**flags, "gradient_accumulation_steps": 4, "max_steps": 5}
    with recorded() as rest:
        result = run_training(
            *arguments(folder, tmp_path / "same", **same, resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        )
    assert [sorted(step) for step in rest] == [
        sorted(first + second) for first, second in zip(ranks[0]["rest"], ranks[1]["rest"], strict=True)
    ]
    losses = logged(result)
    assert losses == pytest.approx(ranks[0]["losses"], abs=2e-5)

    # Steps of half the size: all that is left of the epoch, once, and then another full one.
    with recorded() as rest:
        run_training(*arguments(folder, tmp_path, **flags))
    trained = {number for seen in ranks for step in seen["first"] for number in step}
    seen = [number for step in rest for number in step]
    left = NUM_SAMPLES - len(trained)
    assert {*seen[:left]} | trained == {*range(NUM_SAMPLES)}
    assert sorted(seen[left:]) == list(range(NUM_SAMPLES))


def test_states_that_deepspeed_has_divided_need_as_many_processes(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "stage1" / "cut" / "checkpoint-3", tmp_path / "checkpoint-3")
    (tmp_path / "checkpoint-3" / "latest").write_text("global_step3")  # by this file DeepSpeed finds its own
    with pytest.raises(CheckpointError, match="written by DeepSpeed on 2 processes and can only be resumed on the"):
        run_training(*arguments(folder, tmp_path, **FLAGS, **CASES["stage1"]))


def interrupt(command: list[str], output_dir: Path, number: signal.Signals, log: Path) -> tuple[int, str]:
    """Start a command, wait for its checkpoint, signal all its processes as Slurm does (Ctrl-C: as a terminal
    does, which does not know those that torchrun starts).

    Returns:
        Exit status and what was printed.
    """
    old = {path.name for path in output_dir.glob("checkpoint-*")}
    with log.open("w") as file:
        # As a script of Slurm does: the launcher ignores the signal, its workers install their own handler.
        process = subprocess.Popen(
            command,
            env=environment(),
            stdout=file,
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: signal.signal(signal.SIGUSR1, signal.SIG_IGN),
            start_new_session=True,
        )
    family: list[psutil.Process] = []
    try:
        end = time.monotonic() + TIMEOUT
        while {path.name for path in output_dir.glob("checkpoint-*")} <= old:
            assert process.poll() is None, log.read_text()[-5000:]
            assert time.monotonic() < end, log.read_text()[-5000:]
            time.sleep(0.2)
            # Slurm signals all processes of a job; those that torchrun starts are no longer of its group.
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        group = os.getpgid(process.pid)
        for each in family:
            with suppress(psutil.NoSuchProcess, ProcessLookupError):
                if number != signal.SIGINT or os.getpgid(each.pid) == group:
                    each.send_signal(number)
        return process.wait(timeout=TIMEOUT), log.read_text()
    finally:
        for each in family:
            with suppress(psutil.NoSuchProcess):
                each.kill()


def test_r28_signals_to_all_processes_of_a_job(folder: Path, tmp_path: Path) -> None:
    """Data workers get them, too. First under torchrun, then the command resumes alone and is ended by SIGTERM."""
    flags = {
        "model_name_or_path": folder / "llm",
        "vision_tower": folder / "tower",
        "num_image_tokens": 4,
        "tune_mm_mlp_adapter": True,
        "data_path": folder / "data.jsonl",
        "image_folder": folder / "images",
        "output_dir": tmp_path,
        "bf16": False,
        "max_steps": 100_000,
        "per_device_train_batch_size": 1,
        "dataloader_num_workers": 1,
        "save_steps": 5,
        "logging_steps": 1000,
        "save_total_limit": 2,
        "report_to": "none",
    }
    words = ["-m", "metamorph", "train", *(f"--{name}={value}" for name, value in flags.items())]
    status, printed = interrupt([*LAUNCH, *words], tmp_path, signal.SIGUSR1, folder / "log")
    assert status == 1, printed[-5000:]
    marker = json.loads((tmp_path / MARKER_FILE).read_text())
    assert marker["signal"] == "SIGUSR1"
    assert (tmp_path / marker["checkpoint"]).is_dir()

    # One process with twice the micro-batches: the count of steps continues.
    words = [sys.executable, *words, "--gradient_accumulation_steps=2"]
    status, printed = interrupt(words, tmp_path, signal.SIGTERM, folder / "log")
    assert status == PREEMPTED, printed[-5000:]
    assert f"resuming from {tmp_path / marker['checkpoint']}" in printed
    second = json.loads((tmp_path / MARKER_FILE).read_text())
    assert second["signal"] == "SIGTERM"
    assert second["step"] > marker["step"]
    assert len(list(tmp_path.glob("checkpoint-*"))) == 2

    # Ctrl-C: one process with its data workers, then torchrun, which passes it on. Nothing starts such a run again.
    for command, expected in ((words, 130), ([*LAUNCH, *words[1:]], 1)):
        status, printed = interrupt(command, tmp_path, signal.SIGINT, folder / "log")
        assert status == expected, printed[-5000:]
        assert printed.count("Ctrl-C: saving a checkpoint, then stopping. Press Ctrl-C again to quit at once.") == 1
        (line,) = re.findall(
            r"metamorph train: interrupted after step (\d+); to resume: run the same command again, or .*", printed
        )
        assert sorted(tmp_path.glob("checkpoint-*"), key=os.path.getmtime)[-1].name == f"checkpoint-{line}"
        assert not (tmp_path / MARKER_FILE).exists()
        assert (
            "Traceback (most recent call last):\n  File" not in printed.split("Ctrl-C: saving")[1] or command != words
        )
