"""Each understanding benchmark that ships, from files of its layout to its figures, with `mini`."""

from pathlib import Path

import pytest
import torch
from understanding_parts import LAYOUTS

import metamorph
from metamorph.evaluation.benchmarks.run import run_spec
from metamorph.evaluation.benchmarks.spec import read_spec
from metamorph.inference import Session


@pytest.fixture(scope="module")
def session() -> Session:
    return metamorph.load("mini", device="cpu", dtype=torch.float32)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_same_figures_twice(name: str, session: Session, tmp_path: Path) -> None:
    spec, data = read_spec(name), LAYOUTS[name](tmp_path / "data")
    one, two = (
        run_spec(spec, "mini", None, tmp_path / out, lambda: session, data_path=data, device=torch.device("cpu"))
        for out in ("one", "two")
    )
    assert one["errors"] == 0
    assert all(answer["text"] for answer in one["answers"])
    assert spec.metric.headline in one["summary"]
    assert {**one, "date": ""} == {**two, "date": ""}
