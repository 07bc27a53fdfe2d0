"""The committed examples, run as they are."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest


pytestmark = pytest.mark.integration


EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.slow
def test_idioms_of_transformers_give_what_their_users_expect() -> None:
    # In a process of its own, in which nothing but `import metamorph` has registered the model.
    subprocess.run([sys.executable, str(EXAMPLES / "transformers_first_hour.py")], check=True)


@pytest.mark.slow
def test_both_losses_fall_on_photographs(tmp_path: Path) -> None:
    logs = runpy.run_path(str(EXAMPLES / "real_images.py"))["train"](tmp_path, steps=20)

    assert len(list((tmp_path / "data" / "images").glob("*.jpg"))) == 48
    assert [len(lines) for lines in logs.values()] == [20, 20]
    assert falls(logs["stage1"], "text_loss") > 0.1
    assert falls(logs["stage2"], "text_loss") > 0.5
    assert falls(logs["stage2"], "visual_loss") > 0.1
    assert all("visual_loss" not in line for line in logs["stage1"])


def falls(lines: list[dict[str, float]], name: str) -> float:
    """By how much a loss is lower in the last five steps than in the first five."""
    values = [line[name] for line in lines]
    return sum(values[:5]) / 5 - sum(values[-5:]) / 5
