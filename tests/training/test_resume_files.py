"""What can happen to checkpoints: a kill while one is written, damage, a full disk; the last good one is used."""

import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from preemption_parts import SignalIn
from safetensors.torch import load_file
from training_parts import arguments, logged
from transformers import TrainerCallback

from metamorph.runs import checkpoint_files
from metamorph.runs.checkpoint_files import (
    MANIFEST_FILE,
    PARTIAL_FOLDER,
    CheckpointError,
    checkpoints,
    delete_old,
    find_damage,
    read_manifest,
)
from metamorph.runs.preemption import Preempted
from metamorph.training.arguments import MetaMorphTrainingArguments
from metamorph.training.checkpoints.resume import find_stage_checkpoint
from metamorph.training.run import TrainResult, run_training


pytestmark = pytest.mark.integration


FLAGS: dict[str, Any] = {"stage": 1, "max_steps": 6, "save_strategy": "steps", "save_steps": 2}

DYING = """
import os, signal, sys
from pathlib import Path
from training_parts import arguments, logged
from metamorph.training import run
from metamorph.training.checkpoints import saving as checkpointing
from metamorph.training.trainer import MetaMorphTrainer

class Dying(MetaMorphTrainer):
    def _save_rng_state(self, folder):
        if self.state.global_step == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        super()._save_rng_state(folder)

def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)

if sys.argv[3] == "writing":
    run.MetaMorphTrainer = Dying
else:
    keep = checkpointing.commit_checkpoint
    checkpointing.commit_checkpoint = lambda folder, name, record: (die if name.endswith("-4") else keep)(
        folder, name, record
    )
run.run_training(*arguments(Path(sys.argv[1]), Path(sys.argv[2]), stage=1, max_steps=6, save_strategy="steps",
                            save_steps=2, save_total_limit=1))
"""
"""A run that is killed while it saves after step 4: amid writing, or when all is written but not yet in its place."""


@pytest.fixture(scope="module")
def uninterrupted(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return run_training(*arguments(parts, tmp_path_factory.mktemp("uninterrupted"), **FLAGS))


@pytest.fixture
def run_folder(uninterrupted: TrainResult, tmp_path: Path) -> Path:
    """A copy of the run's folder with its checkpoints 2, 4 and 6."""
    return shutil.copytree(uninterrupted.output_dir, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("when", ["writing", "written"])
def test_killed_while_saving(parts: Path, uninterrupted: TrainResult, tmp_path: Path, when: str) -> None:
    folder = Path(__file__).parent
    paths = os.pathsep.join([str(folder), str(folder.parent / "parts"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", DYING, str(parts), str(tmp_path), when],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        timeout=300,
        capture_output=True,
        text=True,
    )
    assert done.returncode == -9, done.stderr[-3000:]
    assert (tmp_path / PARTIAL_FOLDER / "checkpoint-4" / "optimizer.pt").is_file()  # it had begun
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]  # the limit has not touched it
    again = run_training(*arguments(parts, tmp_path, **FLAGS, save_total_limit=1))
    assert logged(again) == logged(uninterrupted)
    assert logged(again, "step") == [1, 2, 3, 4, 5, 6]
    assert {path.name for path in tmp_path.glob("*_*")} <= {"model_and_data_args.json", "mm_projector.safetensors"} | {
        "chat_template.jinja",
        "processor_config.json",
        "tokenizer_config.json",
        "trainer_state.json",
        "training_args.json",
    }  # nothing half-written is left


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def zero_the_end(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[:-100] + bytes(100))


@pytest.mark.parametrize(
    ("file", "spoil", "message"),
    [
        ("mm_projector.safetensors", cut_off, "mm_projector.safetensors has .* bytes instead of"),
        ("optimizer.pt", zero_the_end, "content of its optimizer.pt has changed"),
        ("rng_state.pth", Path.unlink, "rng_state.pth is missing"),
        (MANIFEST_FILE, Path.unlink, "so it is incomplete"),
        (MANIFEST_FILE, cut_off, "checkpoint.json cannot be read"),
    ],
)
def test_damaged_checkpoints_are_passed_over(
    run_folder: Path, file: str, spoil: Callable[[Path], None], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    spoil(run_folder / "checkpoint-6" / file)
    with caplog.at_level(logging.WARNING):
        assert find_stage_checkpoint(str(run_folder), None, 1) == str(run_folder / "checkpoint-4")
    assert f"skipping the checkpoint {run_folder / 'checkpoint-6'}: " in caplog.text
    with pytest.raises(ValueError, match=message):
        find_stage_checkpoint(str(run_folder), str(run_folder / "checkpoint-6"), 1)


class Planted:
    """Runs when it is unpickled."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_code_in_a_checkpoint_never_runs(
    parts: Path, run_folder: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where the list of files has been written to fit."""
    monkeypatch.chdir(run_folder)
    folder = run_folder / "checkpoint-2"
    torch.save(Planted(), folder / file)
    manifest = read_manifest(folder)
    assert manifest is not None
    manifest["files"][file] = checkpoint_files.file_stamp(folder / file)
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="hold more than tensors and numbers"):
        run_training(*arguments(parts, run_folder, **FLAGS, resume_from_checkpoint=str(folder)))
    assert not (run_folder / "ran").exists()


def test_no_checkpoint_is_usable(run_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for folder in run_folder.glob("checkpoint-*"):
        (folder / MANIFEST_FILE).unlink()
    assert find_stage_checkpoint(str(run_folder), None, 1) is None
    assert "starting from the beginning" in caplog.text
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        find_stage_checkpoint(str(run_folder), "True", 1)
    for folder in run_folder.glob("checkpoint-*"):
        shutil.rmtree(folder)
    assert find_stage_checkpoint(str(run_folder), None, 1) is None
    assert "holds a result and no checkpoint: it is trained again and replaced" in caplog.text


def test_large_files_are_checked_at_their_ends(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_files, "_WHOLE", 1000)
    monkeypatch.setattr(checkpoint_files, "_BLOCK", 300)
    folder = run_folder / "checkpoint-6"
    manifest = read_manifest(folder)
    assert manifest is not None
    file = folder / "optimizer.pt"
    manifest["files"] = {"optimizer.pt": checkpoint_files.file_stamp(file)}
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    assert find_damage(folder) is None
    zero_the_end(file)
    assert find_damage(folder) is not None


def test_newest_is_what_was_written_last(parts: Path, run_folder: Path, tmp_path: Path) -> None:
    """Going back to an old checkpoint makes another future, which a restart must not leave."""
    flags = {**FLAGS, "max_steps": 4, "learning_rate": 1e-3}
    old = str(run_folder / "checkpoint-2")
    run_training(*arguments(parts, run_folder, **flags, resume_from_checkpoint=old))
    assert [path.name for path in checkpoints(run_folder)] == ["checkpoint-2", "checkpoint-6", "checkpoint-4"]
    assert find_stage_checkpoint(str(run_folder), None, 1) == str(run_folder / "checkpoint-4")
    assert [find_damage(path) for path in checkpoints(run_folder)] == [None, None, None]


def test_the_limit_keeps_what_is_good(run_folder: Path) -> None:
    (run_folder / "checkpoint-6" / MANIFEST_FILE).unlink()  # incomplete: it does not count
    delete_old(run_folder, None)
    delete_old(run_folder, 0)
    delete_old(run_folder, 2)
    assert len(list(run_folder.glob("checkpoint-*"))) == 3
    delete_old(run_folder, 1, protected=str(run_folder / "checkpoint-2"))
    assert {path.name for path in run_folder.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4", "checkpoint-6"}
    delete_old(run_folder, 1)
    assert {path.name for path in run_folder.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-6"}


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """Writes beyond fail as on a full disk: in the middle of a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class FullDiskAfter(TrainerCallback):
    """Lets writes fail from a step on."""

    def __init__(self, step: int, size: int) -> None:
        self.step, self.limit = step, no_file_larger_than(size)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.limit.__enter__()


@pytest.mark.parametrize("size", [1_000, 12_000, 16_000])  # the weights, the tokenizer, the optimizer do not fit
def test_full_disk(parts: Path, uninterrupted: TrainResult, tmp_path: Path, size: int) -> None:
    full = FullDiskAfter(4, size)
    try:
        with pytest.raises(CheckpointError) as caught:
            run_training(*arguments(parts, tmp_path, **FLAGS, save_total_limit=1), callbacks=[full])
    finally:
        full.limit.__exit__(None, None, None)
    message = str(caught.value)
    assert f"checkpoint-4 cannot be written to --output_dir {tmp_path}" in message
    assert f"the last good checkpoint is {tmp_path / 'checkpoint-2'}" in message
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    again = run_training(*arguments(parts, tmp_path, **FLAGS, save_total_limit=1))
    assert logged(again) == logged(uninterrupted)


def best_flags(parts: Path) -> dict[str, object]:
    """The loss falls, and the highest is asked for, so that the best checkpoint is not the last."""
    flags = {**FLAGS, "learning_rate": 30.0, "save_steps": 1, "max_steps": 3, "warmup_ratio": 0}
    flags |= {"eval_data_path": str(parts / "data.jsonl"), "eval_image_folder": str(parts / "images")}
    flags |= {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    return flags | {"metric_for_best_model": "eval_loss", "greater_is_better": True}


def test_the_best_checkpoint_stays_and_becomes_the_result(parts: Path, tmp_path: Path) -> None:
    result = run_training(*arguments(parts, tmp_path, **best_flags(parts), save_total_limit=1))
    measured = {line["step"]: line["eval_loss"] for line in result.log_history if "eval_loss" in line}
    best = tmp_path / f"checkpoint-{max(measured, key=measured.__getitem__)}"
    assert find_damage(best) is None
    assert f'"best_model_checkpoint": "{best}"' in (tmp_path / "trainer_state.json").read_text()
    assert best.name != "checkpoint-3"
    logged = {name for line in result.log_history for name in line}
    assert not [name for name in logged if name.startswith("eval_data_")]  # a single source is measured once
    weights, expected = (load_file(folder / "mm_projector.safetensors") for folder in (tmp_path, best))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_a_finished_run_keeps_its_best_checkpoint_as_the_result(parts: Path, tmp_path: Path) -> None:
    default = MetaMorphTrainingArguments.save_total_limit
    run_training(*arguments(parts, tmp_path, **best_flags(parts), save_total_limit=default))
    assert len(list(tmp_path.glob("checkpoint-*"))) == 2  # by default, the best one and the last one among them
    before = load_file(tmp_path / "mm_projector.safetensors")
    run_training(*arguments(parts, tmp_path, **best_flags(parts)))
    after = load_file(tmp_path / "mm_projector.safetensors")
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_preempted_run_keeps_its_last_checkpoint_and_the_best(parts: Path, tmp_path: Path) -> None:
    flags = {**best_flags(parts), "save_total_limit": 1, "gradient_accumulation_steps": 2}
    with pytest.raises(Preempted):
        run_training(*arguments(parts, tmp_path, **flags), callbacks=[SignalIn(2, signal.SIGTERM)])
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
