"""The study: what is compared with what, how it is summarised, and that it continues where it was interrupted."""

import json
from dataclasses import replace

import pytest

from metamorph.miniature.quickstart.recipe import FAST
from metamorph.miniature.study import (
    GENERATION_ONLY,
    JOINT,
    Mixture,
    StudySettings,
    grid_mixtures,
    joint_mixtures,
    run_study,
    summarise_runs,
)
from metamorph.runs.progress import Progress


def test_both_conditions_see_the_same_drawings_in_the_same_number_of_steps():
    alone, joint = joint_mixtures([500], generation_per_step=16, passes=2)
    assert (alone.condition, joint.condition) == (GENERATION_ONLY, JOINT)
    assert alone.steps == joint.steps == 63
    assert (alone.batch_size, joint.batch_size) == (16, 32)
    assert (alone.questions, joint.questions) == (0, 500)


def test_grid_has_every_combination_that_has_data():
    found = grid_mixtures([0, 20], [0, 30], steps=10)
    assert [(one.questions, one.drawings, one.batch_size) for one in found] == [(20, 0, 2), (0, 30, 3), (20, 30, 5)]
    assert {one.steps for one in found} == {10}
    with pytest.raises(ValueError, match="0 of --questions and 30 of --budgets are fewer records than --steps 40"):
        grid_mixtures([0, 20], [30], steps=40)


def test_summary_is_mean_and_standard_error_over_seeds():
    runs = [
        {"seed": seed, "condition": JOINT, "questions": 100, "drawings": 100, "seen": figures, "held_out": figures}
        | {"vqa": {"accuracy": figures["all"]}}
        for seed, figures in enumerate(
            ({"all": 0.2, "cosine": 0.9, "nearest": 0.5}, {"all": 0.4, "cosine": 0.8, "nearest": 0.7})
        )
    ]
    seen, held_out, vqa = summarise_runs(runs)
    shared = {"condition": JOINT, "questions": 100, "drawings": 100, "n": 2, "mean": 0.3, "standard_error": 0.1}
    assert seen == {"group": "seen", **shared, "cosine": 0.85, "nearest": 0.6}
    assert vqa == {"group": "vqa", **shared}
    assert held_out["group"] == "held_out"
    assert summarise_runs(runs[:1])[0]["standard_error"] == 0


@pytest.mark.slow
def test_a_study_runs_and_continues_where_it_was_interrupted(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(Progress, "first_seconds", 0.0)
    caplog.set_level("INFO", "metamorph")
    recipe = replace(FAST, stage1_steps=2)
    mixtures = grid_mixtures([0, 16], [0, 16], steps=2)
    settings = StudySettings(tmp_path, "data-grid", mixtures, seeds=1, world="rich", judged=4, asked=5)
    result = run_study(settings, recipe)
    found = [(run["questions"], run["drawings"], run["steps"], run["seen"]["n"]) for run in result["runs"]]
    assert found == [(16, 0, 2, 4), (0, 16, 2, 4), (16, 16, 2, 4)]
    assert all(run["vqa"]["n"] == 5 for run in result["runs"])
    assert {name: row["n"] for name, row in result["runs"][0]["seen"]["by_objects"].items()} == {"2": 2, "3": 2}
    for name in ("data-grid.png", "data-grid-maps.png"):
        assert (tmp_path / name).stat().st_size > 1000
    assert sum(line.startswith("drawings · step 16/16 · took ") for line in caplog.messages) == 3

    # The first runs stay as they are; only the last, whose line is lost, is trained again, to the same figures.
    runs = (tmp_path / "runs.jsonl").read_text().splitlines()
    marked = [json.dumps({**json.loads(line), "seconds": -1.0}) for line in runs[:-1]]
    (tmp_path / "runs.jsonl").write_text("\n".join(marked) + "\n")
    again = run_study(settings, recipe)
    assert [run["seconds"] for run in again["runs"][:-1]] == [-1.0, -1.0]
    for name in ("seen", "held_out", "vqa", "visual_loss"):
        assert again["runs"][-1][name] == result["runs"][-1][name]

    # Another study of the same folder takes the runs that both have; more data does not change the first records.
    more = replace(settings, name="other", mixtures=(mixtures[1], Mixture("more", 0, 24, 8)))
    other = run_study(more, recipe)
    assert [run["seconds"] > 0 for run in other["runs"]] == [False, True]

    with pytest.raises(ValueError, match="holds a study with other settings"):
        run_study(replace(settings, asked=6), recipe)
