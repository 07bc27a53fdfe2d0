"""Each understanding benchmark that ships, from files of its layout to its figures, with `mini`."""

import json
from pathlib import Path

import pytest
import torch
from benchmark_parts import write_questions, write_spec
from understanding_parts import LAYOUTS, write_lines

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


def test_mini_is_right_about_its_world_in_an_own_table(session: Session, tmp_path: Path) -> None:
    """By word and by option: an answer counts where it should."""
    data = write_questions(tmp_path)
    records = [json.loads(line) for line in data.read_text().splitlines()]
    words = sorted({record["answer"] for record in records})
    others = {record["answer"]: [word for word in words if word != record["answer"]] for record in records}
    write_lines(data, [{**record, "options": [record["answer"], *others[record["answer"]]]} for record in records])
    table = {"loader": "table", "path": data.name, "images": "images", "id": "id", "categories": {"type": "type"}}
    choices = {**table, "options": "options", "answer_is": "text"}
    figures = []
    for name, given, metric in (("words", table, "exact_match"), ("options", choices, "multiple_choice")):
        spec = read_spec(str(write_spec(tmp_path / f"{name}.yaml", data=given, metric={"name": metric})))
        result = run_spec(spec, "mini", None, tmp_path / name, lambda: session, device=torch.device("cpu"))
        assert result["categories"]["type"].keys() == {record["type"] for record in records}
        figures.append(result["summary"][spec.metric.headline]["value"])
    assert figures[0] == figures[1] >= 0.75
