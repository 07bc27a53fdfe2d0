"""The shell scripts: what they refuse, and a run that a signal stops and the same command finishes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest


pytestmark = pytest.mark.integration


ROOT = Path(__file__).parents[1]
ONE_NODE = ("scripts/pretrain_1node.sh", "scripts/finetune_1node.sh", "visualization/train_1node.sh")
SLURM = ("scripts/slurm_pretrain.sh", "scripts/slurm_finetune.sh", "visualization/submit.sh")
SAMPLES = 40


def environment(**variables: object) -> dict[str, str]:
    """That of the tests, without what a job or a user may have set, and some variables."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "CUDA_"))}
    return kept | {"PYTHON": sys.executable, **{name: str(value) for name, value in variables.items()}}


@pytest.mark.parametrize("script", [*ONE_NODE, *SLURM])
def test_r34_scripts_of_the_guide_exist_are_strict_and_hold_no_keys(script: str) -> None:
    text = (ROOT / script).read_text(encoding="utf-8")
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "set -euo pipefail" in text
    assert os.access(ROOT / script, os.X_OK)
    assert not re.search(r"(?i)(token|api_?key|password)=", text)


@pytest.mark.parametrize("script", SLURM)
def test_r28_slurm_scripts_are_signalled_requeued_and_keep_their_output(script: str) -> None:
    options = set(re.findall(r"^#SBATCH (\S+)$", (ROOT / script).read_text(encoding="utf-8"), re.MULTILINE))
    assert {"--ntasks-per-node=1", "--signal=B:USR1@600", "--requeue", "--open-mode=append"} <= options


@pytest.mark.parametrize("script", [*ONE_NODE, *SLURM])
def test_r28_a_missing_variable_is_named_before_anything_runs(script: str, tmp_path: Path) -> None:
    env = environment(METAMORPH_HOME=ROOT)
    done = subprocess.run(
        ["bash", str(ROOT / script)], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1
    assert re.search(r"(DATA_PATH|IMAGE_FOLDER|PRETRAIN_MM_MLP_ADAPTER): set \1 to ", done.stderr), done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", SLURM)
def test_a_job_that_was_submitted_from_elsewhere_says_what_to_do(script: str, tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", str(ROOT / script)],
        env=environment(SLURM_SUBMIT_DIR=tmp_path),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1
    assert f"{tmp_path} is not the repository: submit from its folder, or set METAMORPH_HOME" in done.stderr


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        ("", 1),
        ("-1", 1),
        ("NoDevFiles", 1),
        ("3", 1),
        ("0,1", 2),
        ("0,1,2,3,4,5,6,7", 8),
        ("GPU-8f3a,GPU-11c2,MIG-3", 3),
    ],
)
def test_one_process_for_each_visible_gpu_and_one_without(visible: str, expected: int) -> None:
    command = f"source {ROOT}/scripts/common.sh; count_processes"
    env = environment(CUDA_VISIBLE_DEVICES=visible)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command], env=env, capture_output=True, text=True, timeout=300
    )
    assert (done.stdout, done.returncode) == (f"{expected}\n", 0)


def test_waiting_for_a_child_outlasts_signals_and_returns_its_status() -> None:
    command = f"""
        source {ROOT}/scripts/common.sh
        trap 'echo signal' USR1
        (sleep 1; exit 7) & child=$!
        (sleep 0.3; kill -USR1 $$) &
        status=0; wait_through_signals "$child" || status=$?; echo $status
        (kill -SEGV "$BASHPID") & status=0; wait_through_signals $! || status=$?; echo $status
        true & status=0; wait_through_signals $! || status=$?; echo $status
    """
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", command], capture_output=True, text=True, timeout=300)
    assert done.stdout == f"signal\n7\n{128 + signal.SIGSEGV}\n0\n"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM], ids=lambda number: number.name)
def test_r25_a_signal_to_the_script_saves_and_the_same_command_finishes(
    parts: Path, tmp_path: Path, number: signal.Signals
) -> None:
    env = environment(
        RECIPE="tiny-cpu-stage1",
        MODEL_NAME_OR_PATH=parts / "llm",
        VISION_TOWER=parts / "tower",
        DATA_PATH=parts / "data.jsonl",
        IMAGE_FOLDER=parts / "images",
        OUTPUT_DIR=tmp_path / "out",
        PER_DEVICE_TRAIN_BATCH_SIZE=1,
        NPROC_PER_NODE=2 if number is signal.SIGUSR1 else 1,
        MAX_RESTARTS=1 if number is signal.SIGUSR1 else 0,  # a run that stops for a signal is not restarted
    )
    flags = ["--num_image_tokens", "4", "--logging_steps", "1", "--max_steps"]
    command = ["bash", str(ROOT / "scripts/pretrain_1node.sh"), *flags]
    log = tmp_path / "log"
    with log.open("w") as output:
        # So many steps that only the signal can end it.
        running = subprocess.Popen(
            [*command, "1000000"], env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            deadline = time.monotonic() + 300
            while re.search(r"step +1/", log.read_text()) is None:
                assert running.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
            running.send_signal(number)
            assert running.wait(timeout=300) == 75, log.read_text()
            assert log.read_text().count("preempted at step") == 1
        finally:
            with suppress(ProcessLookupError):  # nothing is left if all went well
                os.killpg(running.pid, signal.SIGKILL)
    step = json.loads((tmp_path / "out" / "preempted.json").read_text())["step"]
    assert step >= 1
    assert (tmp_path / "out" / f"checkpoint-{step}").is_dir()

    done = subprocess.run([*command, str(step + 2)], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"stage 1 finished after {step + 2} steps" in done.stdout
    assert not (tmp_path / "out" / "preempted.json").exists()
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert [line["step"] for line in history if "loss" in line] == list(range(1, step + 3))
