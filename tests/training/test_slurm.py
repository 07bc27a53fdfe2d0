"""Both stages through the Slurm scripts on two nodes, interrupted or crashed: the losses are those of one piece."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image
from slurm_parts import Job, losses, needs_slurm, submit
from training_parts import NUM_IMAGE_TOKENS, make_language_model, make_records, make_vision_tower

from metamorph import cli


pytestmark = needs_slurm

STEPS = 12
SAMPLES = 2 * STEPS  # one per node and step
FLAGS = ("--num_image_tokens", str(NUM_IMAGE_TOKENS), "--logging_steps", "1", "--lr_scheduler_type", "constant")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models, and records with large images, so that a step takes long enough for a signal."""
    folder = tmp_path_factory.mktemp("slurm")
    make_language_model(folder / "llm")
    make_vision_tower(folder / "tower")
    make_records(folder, SAMPLES)
    for path in (folder / "images").glob("*.png"):
        with Image.open(path) as small:
            Image.fromarray(np.kron(np.asarray(small), np.ones((80, 80, 1), dtype=np.uint8))).save(path)
    return folder


def variables(folder: Path, stage: int) -> dict[str, object]:
    return {
        "RECIPE": f"tiny-cpu-stage{stage}",
        "MODEL_NAME_OR_PATH": folder / "llm",
        "VISION_TOWER": folder / "tower",
        "DATA_PATH": folder / "data.jsonl",
        "IMAGE_FOLDER": folder / "images",
        "OUTPUT_DIR": folder / f"stage{stage}",
        "PER_DEVICE_TRAIN_BATCH_SIZE": 1,
    }


def train_in_one_piece(folder: Path, stage: int, *flags: str) -> list[tuple[int, float]]:
    """The losses of the same run in this process, not interrupted."""
    values = variables(folder, stage) | {"OUTPUT_DIR": folder / f"plain{stage}", "PER_DEVICE_TRAIN_BATCH_SIZE": 2}
    given = [word for name, value in values.items() if name != "RECIPE" for word in (f"--{name.lower()}", str(value))]
    assert cli.main(["train", "--config", str(values["RECIPE"]), *given, *FLAGS, *flags]) == 0
    return losses(folder / f"plain{stage}")


def interrupt_and_finish(job: Job, interrupt: Callable[[], None], output_dir: Path) -> int:
    """Interrupt a job after its second step and let it finish; the step it was stopped after."""
    job.wait_for("two steps", lambda: re.search(r"step +2/", job.text()) is not None)
    interrupt()
    job.wait_for_requeue()
    marker = json.loads((output_dir / "preempted.json").read_text())
    assert job.wait_for_end() == "COMPLETED", job.story()
    assert job.field("Restarts") == "1"
    assert "start 0, on n[1-2]" in job.text()  # one log for both starts
    assert "start 1, on n[1-2]" in job.text()
    assert not (output_dir / "preempted.json").exists()
    return marker["step"]


def check_continuity(stopped: int, resumed: list[tuple[int, float]], plain: list[tuple[int, float]]) -> None:
    assert 2 <= stopped < STEPS
    assert [step for step, _ in resumed] == list(range(1, STEPS + 1))
    assert [loss for _, loss in resumed] == pytest.approx([loss for _, loss in plain], abs=2e-5)
    assert len({round(loss, 6) for _, loss in plain}) == STEPS  # every step has different samples, which losses show


def test_r28_stage_1_at_its_time_limit_and_stage_2_preempted_resume_at_the_next_sample(folder: Path) -> None:
    job = submit("scripts/slurm_pretrain.sh", folder, variables(folder, 1), *FLAGS)
    stopped = interrupt_and_finish(job, job.reach_time_limit, folder / "stage1")
    check_continuity(stopped, losses(folder / "stage1"), train_in_one_piece(folder, 1))

    adapter = {"PRETRAIN_MM_MLP_ADAPTER": folder / "stage1"}
    job = submit("scripts/slurm_finetune.sh", folder, variables(folder, 2) | adapter, *FLAGS)
    stopped = interrupt_and_finish(job, job.give_way, folder / "stage2")
    plain = train_in_one_piece(folder, 2, "--pretrain_mm_mlp_adapter", str(folder / "stage1"))
    check_continuity(stopped, losses(folder / "stage2"), plain)


def find_process(output_dir: Path, rank: int) -> psutil.Process:
    """The training process of a rank; its data workers have the same environment."""
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            environment, parent = process.environ(), process.parent()
            mine = environment.get("OUTPUT_DIR") == str(output_dir) and environment.get("RANK") == str(rank)
            if mine and parent is not None and "RANK" not in parent.environ():
                return process
    raise AssertionError(f"no process of rank {rank} trains into {output_dir}")


def test_a_process_that_crashes_is_restarted_within_its_job_and_resumes(folder: Path) -> None:
    output = folder / "crashed"
    flags = (*FLAGS, "--save_strategy", "steps", "--save_steps", "2")
    job = submit("scripts/slurm_pretrain.sh", folder, variables(folder, 1) | {"OUTPUT_DIR": output}, *flags)
    job.wait_for("a checkpoint", lambda: (output / "checkpoint-2").is_dir())
    find_process(output, rank=1).kill()
    assert job.wait_for_end() == "COMPLETED", job.story()
    assert job.field("Restarts") == "0"
    assert f"resuming from {output}/checkpoint-" in job.text()
    assert [step for step, _ in losses(output)] == list(range(1, STEPS + 1))
    plain = [loss for _, loss in train_in_one_piece(folder, 1)]
    assert [loss for _, loss in losses(output)] == pytest.approx(plain, abs=2e-5)


def test_failed_and_cancelled_jobs_stay_out_of_the_queue(folder: Path) -> None:
    output = folder / "cancelled"
    job = submit("scripts/slurm_pretrain.sh", folder, variables(folder, 1) | {"OUTPUT_DIR": output}, *FLAGS)
    wrong = submit("scripts/slurm_pretrain.sh", folder, variables(folder, 1) | {"DATA_PATH": "nowhere.jsonl"}, *FLAGS)
    job.wait_for("two steps", lambda: re.search(r"step +2/", job.text()) is not None)
    job.cancel()
    assert job.wait_for_end() == "CANCELLED"
    assert wrong.wait_for_end() == "FAILED"
    assert "nowhere.jsonl" in wrong.text()
    assert (job.field("Restarts"), wrong.field("Restarts")) == ("0", "0")
