"""A resumed run meets the samples that are left, with other batches too, and refuses other data."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from packing_parts import recorded
from preemption_parts import SignalIn
from training_parts import arguments, logged, make_records, training_lines
from transformers import TrainerCallback

from metamorph.data.batching.packing import PACKING_VERSION
from metamorph.runs.checkpoint_files import MANIFEST_FILE, CheckpointError, find_damage
from metamorph.runs.preemption import MARKER_FILE, Preempted
from metamorph.training.run import run_training


pytestmark = pytest.mark.integration


NUM_SAMPLES = 12
FLAGS: dict[str, Any] = {
    "stage": 1,
    "max_steps": -1,
    "num_train_epochs": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 1,
    "learning_rate": "auto",
    "base_learning_rate": 1e-2,
    "base_batch_size": 4,
}
"""Steps of 4 samples: the first epoch ends after step 3. Other steps have another learning rate."""
PACKED: dict[str, Any] = {"packing": True, "model_max_length": 128}


def interrupted(parts: Path, folder: Path, step: int, **flags: Any) -> list[list[int]]:
    """Train until a signal comes in step `step`; the samples of each step."""
    with recorded() as seen, pytest.raises(Preempted):
        run_training(*arguments(parts, folder, **flags), callbacks=[SignalIn(step, signal.SIGTERM)])
    return seen


def flat(steps: list[list[int]]) -> list[int]:
    return [number for step in steps for number in step]


@pytest.fixture(scope="module")
def cut(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]]]:
    """A run that was interrupted after 2 of 3 steps of its first epoch."""
    folder = tmp_path_factory.mktemp("cut")
    return folder, interrupted(parts, folder, 2, **FLAGS)


def test_after_the_signal_only_the_checkpoint_and_the_marker_are_there(cut: tuple[Path, list[list[int]]]) -> None:
    folder, seen = cut
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-2", MARKER_FILE]
    assert find_damage(folder / "checkpoint-2") is None
    assert len(seen) == 2


@pytest.mark.parametrize(
    ("rows", "accumulation"),
    [(4, 1), (1, 4), (1, 1), (2, 1), (3, 1), (1, 3), (5, 1), (1, 5), (12, 1), (7, 2)],
)
def test_batches_of_another_size_meet_each_sample_once(
    parts: Path, cut: tuple[Path, list[list[int]]], tmp_path: Path, rows: int, accumulation: int
) -> None:
    folder, seen = cut
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    flags = {**FLAGS, "per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulation}
    with recorded() as rest:
        result = run_training(*arguments(parts, tmp_path, **flags))
    left = NUM_SAMPLES - len(flat(seen))
    assert sorted(flat(seen) + flat(rest)[:left]) == list(range(NUM_SAMPLES))
    assert sorted(flat(rest)[left:]) == list(range(NUM_SAMPLES))
    per_epoch = -(-NUM_SAMPLES // (rows * accumulation))
    assert result.global_step == 2 * per_epoch
    # The rate is that of a run that had such steps from its beginning.
    uninterrupted = run_training(*arguments(parts, tmp_path / "uninterrupted", **{**flags, "save_strategy": "no"}))
    rates = {line["step"]: line["learning_rate"] for line in uninterrupted.log_history if "text_loss" in line}
    lines = training_lines(result)[len(seen) :]
    assert {line["step"]: line["learning_rate"] for line in lines} == pytest.approx(
        {line["step"]: rates[line["step"]] for line in lines}
    )
    assert not (tmp_path / MARKER_FILE).exists()


def test_interrupted_again_with_other_batches_each_time(parts: Path, tmp_path: Path) -> None:
    flags = {**FLAGS, **PACKED, "num_train_epochs": 1, "per_device_train_batch_size": 1}
    seen = interrupted(parts, tmp_path, 1, **{**flags, "gradient_accumulation_steps": 2})
    seen += interrupted(parts, tmp_path, 1, **{**flags, "gradient_accumulation_steps": 3})
    with recorded() as rest:
        run_training(*arguments(parts, tmp_path, **{**flags, "gradient_accumulation_steps": 1}))
    assert sorted(flat(seen) + flat(rest)) == list(range(NUM_SAMPLES))


def test_steps_of_the_same_size_are_the_same_steps(
    parts: Path, cut: tuple[Path, list[list[int]]], tmp_path: Path
) -> None:
    uninterrupted = run_training(*arguments(parts, tmp_path / "uninterrupted", **FLAGS))
    flags = {**FLAGS, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    resumed = run_training(
        *arguments(parts, tmp_path / "resumed", **flags, resume_from_checkpoint=str(cut[0] / "checkpoint-2"))
    )
    expected = logged(uninterrupted)
    assert logged(resumed) == pytest.approx(expected, abs=1e-5)


def test_grouping_by_length_needs_the_same_micro_batches(parts: Path, tmp_path: Path) -> None:
    flags = {**FLAGS, "train_sampling_strategy": "group_by_length"}
    interrupted(parts, tmp_path, 1, **flags)
    with pytest.raises(CheckpointError, match="per_device_train_batch_size so that its product"):
        run_training(*arguments(parts, tmp_path, **{**flags, "per_device_train_batch_size": 4}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed 42 there, 1 here. Restore --data_seed"),
        ({"packing": True}, "packing False there, True here. Restore --packing"),
        ({"train_sampling_strategy": "sequential"}, "sampling random there, sequential here"),
    ],
)
def test_another_order_is_refused(
    parts: Path, cut: tuple[Path, list[list[int]]], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    checkpoint = str(cut[0] / "checkpoint-2")
    with pytest.raises(CheckpointError, match=message):
        run_training(*arguments(parts, tmp_path, **{**FLAGS, **change}, resume_from_checkpoint=checkpoint))


def test_other_data_are_refused_unless_asked_for(
    parts: Path, cut: tuple[Path, list[list[int]]], tmp_path: Path
) -> None:
    checkpoint = str(cut[0] / "checkpoint-2")
    more = make_records(tmp_path, 13)
    flags = {**FLAGS, "data_path": str(more), "image_folder": str(tmp_path / "images")}
    with pytest.raises(CheckpointError, match=r"sources \{'data': 12\} there, \{'data': 13\} here. Restore"):
        run_training(*arguments(parts, tmp_path / "out", **flags, resume_from_checkpoint=checkpoint))
    changed = (parts / "data.jsonl").read_text().replace("A picture.", "A painting.")
    (tmp_path / "data.jsonl").write_text(changed)
    with pytest.raises(CheckpointError, match="was trained on other data: records"):
        run_training(*arguments(parts, tmp_path / "out", **flags, resume_from_checkpoint=checkpoint))
    flags["ignore_data_skip"] = True
    with recorded() as seen:
        run_training(*arguments(parts, tmp_path / "out", **flags, resume_from_checkpoint=checkpoint))
    assert sorted(flat(seen)[:NUM_SAMPLES]) == list(range(NUM_SAMPLES))  # its epoch from the beginning
    # From now on the step does not determine which samples have been trained on.
    with pytest.raises(CheckpointError, match="does not record its position in the data"):
        run_training(*arguments(parts, tmp_path / "out", **{**flags, "ignore_data_skip": False}))


def test_a_checkpoint_of_another_packing_is_refused_by_name(parts: Path, tmp_path: Path) -> None:
    """Before version 2 no number was noted. Its rows held other samples: the position in them means nothing."""
    flags = {**FLAGS, **PACKED, "per_device_train_batch_size": 1}
    interrupted(parts, tmp_path, 1, **flags)
    manifest = tmp_path / "checkpoint-1" / MANIFEST_FILE
    noted = json.loads(manifest.read_text())
    assert noted["data"].pop("packing_version") == PACKING_VERSION
    manifest.write_text(json.dumps(noted))
    with pytest.raises(CheckpointError, match=r"packing version 1, here 2.* Finish the run with that release, or add"):
        run_training(*arguments(parts, tmp_path, **flags))
    with recorded() as seen:
        run_training(*arguments(parts, tmp_path, **flags, ignore_data_skip=True))
    assert sorted(flat(seen)[:NUM_SAMPLES]) == list(range(NUM_SAMPLES))


def test_a_checkpoint_without_packing_needs_no_version(
    parts: Path, cut: tuple[Path, list[list[int]]], tmp_path: Path
) -> None:
    shutil.copytree(cut[0], tmp_path, dirs_exist_ok=True)
    manifest = tmp_path / "checkpoint-2" / MANIFEST_FILE
    noted = json.loads(manifest.read_text())
    assert noted["data"].pop("packing_version") is None
    manifest.write_text(json.dumps(noted))
    with recorded() as rest:
        run_training(*arguments(parts, tmp_path, **{**FLAGS, "num_train_epochs": 1}))
    assert sorted(flat(cut[1]) + flat(rest)) == list(range(NUM_SAMPLES))


def test_the_same_data_at_another_place_are_the_same(
    parts: Path, cut: tuple[Path, list[list[int]]], tmp_path: Path
) -> None:
    """As with jobs that first copy the data to a disk of their machine."""
    shutil.copy(parts / "data.jsonl", tmp_path / "data.jsonl")
    os.utime(tmp_path / "data.jsonl", (0, 0))
    flags = {**FLAGS, "data_path": str(tmp_path / "data.jsonl")}
    result = run_training(
        *arguments(parts, tmp_path / "out", **flags, resume_from_checkpoint=str(cut[0] / "checkpoint-2"))
    )
    assert result.global_step == 6


class SignalAtInit(TrainerCallback):
    """A signal before the first step."""

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)


def test_a_signal_before_the_first_step_loses_nothing(parts: Path, tmp_path: Path) -> None:
    with pytest.raises(Preempted):
        run_training(*arguments(parts, tmp_path, **FLAGS), callbacks=[SignalAtInit()])
    assert [path.name for path in tmp_path.iterdir()] == [MARKER_FILE]
    assert '"step": 0, "checkpoint": null, "signal": "SIGUSR1"' in (tmp_path / MARKER_FILE).read_text()


def test_a_signal_saves_even_where_nothing_else_does(parts: Path, tmp_path: Path) -> None:
    flags = {**FLAGS, "save_strategy": "no", "save_only_model": True, "num_train_epochs": 1}
    seen = interrupted(parts, tmp_path, 1, **flags)
    with recorded() as rest:
        run_training(*arguments(parts, tmp_path, **flags))
    assert sorted(flat(seen) + flat(rest)) == list(range(NUM_SAMPLES))
