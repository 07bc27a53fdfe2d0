"""The square-root rule: alone, and as `--learning_rate auto`, with and without packing."""

import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from metamorph.data.batching.lengths import Lengths
from metamorph.data.batching.packing import BatchPlanner
from metamorph.training.arguments import MetaMorphTrainingArguments
from metamorph.training.optimizer import (
    LANGUAGE_MODEL,
    apply_learning_rate_rule,
    learning_rates,
    samples_per_step,
    scale_learning_rate,
)


def planner(*, packing: bool) -> BatchPlanner:
    """40 samples of 25 tokens for rows of 100."""
    nothing = np.zeros(40, dtype=np.int32)
    lengths = Lengths(np.full(40, 25, dtype=np.int32), nothing, nothing, nothing)
    return BatchPlanner(lengths, seed=0, world_size=2, rows_per_batch=3, max_length=100, packing=packing)


def flags(tmp_path: Path, **values: object) -> MetaMorphTrainingArguments:
    return MetaMorphTrainingArguments(output_dir=str(tmp_path), **values)


@pytest.mark.parametrize(("base", "base_batch", "batch", "rate"), [(6.93e-5, 1536, 768, 4.9e-5), (1e-3, 256, 64, 5e-4)])
def test_rule(base: float, base_batch: int, batch: int, rate: float) -> None:
    assert scale_learning_rate(base, base_batch, batch) == pytest.approx(rate, rel=1e-3)


def test_command_does_not_wait_for_torch() -> None:
    program = (
        "import sys; from metamorph import cli; cli.main(['--help']); "
        "cli.main(['lr', '--batch', '768']); sys.exit('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", program]
    assert subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout.endswith("4.9e-05\n")


def test_r28_one_rule_decides_the_rate(tmp_path: Path) -> None:
    """Where scripts and text of the original system disagree: its batch of 448 from the guide's base."""
    args = flags(tmp_path, learning_rate="auto", base_learning_rate=6.93e-5, base_batch_size=1536)
    apply_learning_rate_rule(args, 448)
    assert args.learning_rate == pytest.approx(3.74e-5, rel=1e-3)


@pytest.mark.parametrize("values", [(0, 1, 1), (1e-3, 0, 1), (1e-3, 1, -1), (float("nan"), 1, 1)])
def test_rule_refuses_what_is_not_above_zero(values: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="finite number larger than 0"):
        scale_learning_rate(*values)


def test_samples_are_counted_not_rows() -> None:
    assert samples_per_step(planner(packing=False), 5) == 2 * 3 * 5
    assert samples_per_step(planner(packing=True), 5) == 2 * 3 * 5 * 4


def test_auto_applies_the_rule_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    args = flags(tmp_path, learning_rate="auto", base_learning_rate=6.93e-5, base_batch_size=1536)
    with caplog.at_level(logging.INFO, logger="metamorph"):
        done = apply_learning_rate_rule(args, 768)
    assert args.learning_rate == pytest.approx(4.9e-5, rel=1e-3)
    assert learning_rates(args)[LANGUAGE_MODEL] == args.learning_rate
    assert done is not None
    assert done.startswith("learning rate 4.9e-05 = 6.93e-05 × √(768 / 1536)")
    assert done in caplog.text
    assert apply_learning_rate_rule(args, 768) is None  # it is a number now
