"""Checkpoints of the visualizer survive interruption."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file

from metamorph.runs.checkpoint_files import CheckpointError, checkpoints
from metamorph.visualizer_training.checkpoints import (
    TrainingState,
    load_checkpoint,
    resolve_resume,
    save_checkpoint,
)


def build_state(step: int = 0) -> TrainingState:
    torch.manual_seed(step)
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3).requires_grad_(False))
    optimizer = torch.optim.AdamW(model[0].parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    ema = EMAModel(list(model[0].parameters()), decay=0.5)
    state = TrainingState(model, optimizer, scheduler, ema, step=step, samples_seen=4 * step)
    for _ in range(step):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        scheduler.step()
        ema.step(model[0].parameters())
    return state


def test_round_trip_restores_everything_but_frozen_weights(tmp_path):
    saved, loaded = build_state(3), build_state()
    frozen = loaded.model[1].weight.clone()
    load_checkpoint(save_checkpoint(tmp_path, saved, keep=None), loaded)
    assert (loaded.step, loaded.samples_seen) == (3, 12)
    assert torch.equal(loaded.model[0].weight, saved.model[0].weight)
    assert torch.equal(loaded.model[1].weight, frozen)
    assert all(torch.equal(*pair) for pair in zip(loaded.ema.shadow_params, saved.ema.shadow_params, strict=True))
    assert loaded.ema.optimization_step == saved.ema.optimization_step
    moments = [state.optimizer.state_dict()["state"][0]["exp_avg"] for state in (saved, loaded)]
    assert torch.equal(*moments)
    assert loaded.lr_scheduler.get_last_lr() == saved.lr_scheduler.get_last_lr()


def test_other_rates_and_decay_act(tmp_path):
    """The schedule goes on from the peak of the resumed run."""
    folder, other = save_checkpoint(tmp_path, build_state(3), keep=None), build_state()
    other.optimizer.param_groups[0].update(lr=0.5, initial_lr=0.5, weight_decay=0.25)
    other.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(other.optimizer, lambda step: 1 / (1 + step))
    load_checkpoint(folder, other)
    (group,) = other.optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (0.5 / 4, 0.25)
    other.lr_scheduler.step()
    assert group["lr"] == 0.5 / 5


def names(folder: Path) -> list[str]:
    return [path.name for path in checkpoints(folder)]


def test_interrupted_write_leaves_no_checkpoint(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, build_state(1), keep=None)

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", interrupt)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, build_state(2), keep=None)
    assert names(tmp_path) == ["checkpoint-1"]
    assert resolve_resume(None, tmp_path).name == "checkpoint-1"
    save_checkpoint(tmp_path, build_state(3), keep=1)
    assert names(tmp_path) == ["checkpoint-3"]


@pytest.mark.parametrize("damage", ["short", "changed", "missing", "no_list"])
def test_damaged_checkpoints_are_skipped(damage, tmp_path, caplog):
    for step in (1, 2):
        save_checkpoint(tmp_path, build_state(step), keep=None)
    file = tmp_path / "checkpoint-2" / "optimizer.pt"
    if damage == "short":
        file.write_bytes(file.read_bytes()[:-10])
    elif damage == "changed":
        file.write_bytes(bytes(file.stat().st_size))
    elif damage == "missing":
        file.unlink()
    else:
        (tmp_path / "checkpoint-2" / "checkpoint.json").unlink()
    assert resolve_resume("latest", tmp_path).name == "checkpoint-1"
    assert "skipping the checkpoint" in caplog.text
    with pytest.raises(ValueError, match="not a checkpoint that can be used"):
        resolve_resume(str(tmp_path / "checkpoint-2"), tmp_path)
    assert resolve_resume("False", tmp_path) is None


def test_full_disk_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, build_state(1), keep=1)

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(CheckpointError, match=r"No space left.*last good checkpoint is .*checkpoint-1"):
            save_checkpoint(tmp_path, build_state(2), keep=1)
    assert resolve_resume("True", tmp_path).name == "checkpoint-1"


class Planted:
    """Runs when it is unpickled."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("ran",)


def test_a_checkpoint_is_data_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = save_checkpoint(tmp_path, build_state(1), keep=None)
    torch.save({"optimizer": Planted()}, folder / "optimizer.pt")
    with pytest.raises(CheckpointError, match=r"optimizer\.pt holds more than tensors and numbers"):
        load_checkpoint(folder, build_state())
    assert not (tmp_path / "ran").exists()
    weights = load_file(folder / "trained_weights.safetensors")
    save_file({name: value.fill_(torch.nan) for name, value in weights.items()}, folder / "trained_weights.safetensors")
    with pytest.raises(ValueError, match=r"trained_weights\.safetensors: .* holds NaN"):
        load_checkpoint(folder, build_state())


def test_other_data_are_refused(tmp_path):
    saved = build_state(1)
    saved.data = {"pictures": 5, "digest": "a", "seed": 0}
    folder = save_checkpoint(tmp_path, saved, keep=None)
    other = build_state()
    other.data = saved.data | {"digest": "b"}
    with pytest.raises(CheckpointError, match="--image_folder, --image_jsons that it had"):
        load_checkpoint(folder, other)
    other.data = saved.data | {"seed": 1}
    with pytest.raises(CheckpointError, match="seed 0, now 1"):
        load_checkpoint(folder, other)


def test_latest_of_an_empty_folder_starts_anew(tmp_path):
    assert resolve_resume("latest", tmp_path) is None
    assert resolve_resume(None, tmp_path) is None
    with pytest.raises(ValueError, match="no usable checkpoint"):
        resolve_resume("True", tmp_path)
