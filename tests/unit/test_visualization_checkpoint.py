"""Checkpoints of the visualizer survive interruption."""

from __future__ import annotations

import pytest
import torch
from diffusers.training_utils import EMAModel

from metamorph.visualization.checkpoint import (
    TrainingState,
    complete_folder,
    find_checkpoints,
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


def test_interrupted_write_leaves_no_checkpoint(tmp_path):
    save_checkpoint(tmp_path, build_state(1), keep=None)

    def write_half() -> None:
        with complete_folder(tmp_path / "checkpoint-2") as partial:
            (partial / "state.json").write_text("{}")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert [path.name for path in find_checkpoints(tmp_path)] == ["checkpoint-1"]
    assert resolve_resume("latest", tmp_path).name == "checkpoint-1"
    save_checkpoint(tmp_path, build_state(2), keep=1)
    assert [path.name for path in find_checkpoints(tmp_path)] == ["checkpoint-2"]


def test_latest_of_an_empty_folder_starts_anew(tmp_path):
    assert resolve_resume("latest", tmp_path) is None
    assert resolve_resume(None, tmp_path) is None
