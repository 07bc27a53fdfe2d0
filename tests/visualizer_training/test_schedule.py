"""The learning-rate schedule against the reference numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from metamorph.visualizer_training.trainer import log_warmup_linear_decay


FACTS = json.loads((Path(__file__).parents[1] / "golden" / "projectors.json").read_text())


def test_default_schedule_equals_the_reference():
    golden = {int(step): factor for step, factor in FACTS["lr_lambda"].items()}
    ours = [log_warmup_linear_decay(step, 4000, 16000) for step in golden]
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
