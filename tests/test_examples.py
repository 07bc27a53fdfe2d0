"""Both stages on photographs, at the real image size: the committed example, run as it is."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest


pytestmark = pytest.mark.integration


EXAMPLE = Path(__file__).parents[1] / "examples" / "real_pictures.py"


@pytest.mark.slow
def test_both_losses_fall_on_photographs(tmp_path: Path) -> None:
    logs = runpy.run_path(str(EXAMPLE))["train"](tmp_path, steps=20)

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
