"""The learning-rate schedule against the reference numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from metamorph.visualizer_training.schedule import build_lr_scheduler, log_warmup_linear_decay


FACTS = json.loads((Path(__file__).parents[1] / "golden" / "projectors.json").read_text())


def learning_rates(name: str, steps: list[int], **options) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = build_lr_scheduler(name, optimizer, **options)
    (factor,) = scheduler.lr_lambdas
    return [factor(step) for step in steps]


def test_default_schedule_equals_the_reference():
    golden = {int(step): factor for step, factor in FACTS["lr_lambda"].items()}
    ours = learning_rates("log_warmup_linear_decay", list(golden), warmup_steps=4000, training_steps=16000)
    assert ours == pytest.approx(list(golden.values()), abs=1e-9)


def test_constant_with_warmup_equals_the_reference():
    golden = {int(step): factor for step, factor in FACTS["lr_lambda_warmup_constant"].items()}
    ours = learning_rates("constant_with_warmup", list(golden), warmup_steps=10000, training_steps=20000)
    assert ours == pytest.approx(list(golden.values()), abs=1e-9)


@pytest.mark.parametrize("training_steps", [10, 400, 100_000])
def test_r43_horizon_of_the_decay_is_training_steps(training_steps):
    warmup = training_steps // 4
    half_way = warmup + (training_steps - warmup) // 2
    assert log_warmup_linear_decay(warmup, warmup, training_steps) == 1.0
    assert log_warmup_linear_decay(half_way, warmup, training_steps) == pytest.approx(0.5, abs=0.1)
    assert log_warmup_linear_decay(training_steps - 1, warmup, training_steps) > 0
    assert log_warmup_linear_decay(training_steps, warmup, training_steps) == 0.0


def test_no_warmup_starts_at_the_peak():
    assert log_warmup_linear_decay(0, 0, 10) == 1.0


def test_unknown_schedule_names_the_flag():
    with pytest.raises(ValueError, match="--lr_scheduler"):
        learning_rates("logwarmup", [0], warmup_steps=1, training_steps=2)
