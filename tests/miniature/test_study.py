"""The study: what is compared with what, how it is summarised, and that it continues where it was interrupted."""

import json
from dataclasses import replace

import pytest

from metamorph.miniature.quickstart.recipe import FAST
from metamorph.miniature.study import GENERATION_ONLY, JOINT, StudySettings, run_study, study_recipe, summarise_runs
from metamorph.runs.progress import Progress


def test_both_conditions_see_the_same_drawings_in_the_same_number_of_steps(tmp_path):
    settings = StudySettings(tmp_path, budgets=(500,), passes=2, generation_per_step=16)
    alone, joint = (study_recipe(settings, FAST, 500, condition) for condition in (GENERATION_ONLY, JOINT))
    assert alone.stage2_steps == joint.stage2_steps == 63
    assert (alone.batch_size, joint.batch_size) == (16, 32)


def test_summary_is_mean_and_standard_error_over_seeds():
    runs = [
        {"seed": seed, "budget": 100, "condition": JOINT, "seen": figures, "held_out": figures}
        for seed, figures in enumerate(({"all": 0.2, "cosine": 0.9}, {"all": 0.4, "cosine": 0.8}))
    ]
    row = summarise_runs(runs)[0]
    assert row == {
        "group": "seen",
        "condition": JOINT,
        "budget": 100,
        "n": 2,
        "mean": 0.3,
        "standard_error": 0.1,
        "cosine": 0.85,
    }
    assert summarise_runs(runs[:1])[0]["standard_error"] == 0


@pytest.mark.slow
def test_a_study_runs_and_continues_where_it_was_interrupted(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(Progress, "first_seconds", 0.0)
    caplog.set_level("INFO", "metamorph")
    recipe = replace(FAST, stage1_steps=2)
    settings = StudySettings(tmp_path, seeds=1, budgets=(16,), passes=1, drawings=3)
    result = run_study(settings, recipe)
    assert [(run["condition"], run["steps"], run["seen"]["n"]) for run in result["runs"]] == [
        (GENERATION_ONLY, 1, 3),
        (JOINT, 1, 3),
    ]
    assert (tmp_path / "study.png").stat().st_size > 1000
    assert sum(line.startswith("drawings · step 12/12 · took ") for line in caplog.messages) == 2

    # The first run stays as it is; only the second, whose line is lost, is trained again, to the same figures.
    runs = (tmp_path / "runs.jsonl").read_text().splitlines()
    marked = json.dumps({**json.loads(runs[0]), "seconds": -1.0})
    (tmp_path / "runs.jsonl").write_text(marked + "\n")
    again = run_study(settings, recipe)
    assert again["runs"][0]["seconds"] == -1.0
    for name in ("seen", "held_out", "visual_loss"):
        assert again["runs"][1][name] == result["runs"][1][name]

    with pytest.raises(ValueError, match="holds a study with other settings"):
        run_study(replace(settings, passes=2), recipe)
