"""Bootstrap intervals against closed forms, comparison of results by their samples, and plots."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import numpy as np
import pytest
import torch
from benchmark_parts import Exact, register, write_spec
from PIL import Image

from metamorph import cli
from metamorph.evaluation.benchmarks.compare import compare
from metamorph.evaluation.benchmarks.intervals import differences, figures
from metamorph.evaluation.benchmarks.plots import save_comparison, save_result
from metamorph.evaluation.benchmarks.result import make_result, read_result, write_result
from metamorph.evaluation.benchmarks.spec import read_spec
from metamorph.evaluation.loaders import LOADERS
from metamorph.evaluation.metrics import METRICS
from metamorph.evaluation.metrics.base import Tools
from metamorph.evaluation.metrics.yes_no import YesNo
from metamorph.evaluation.samples import Answer, Sample
from metamorph.runs.progress import Progress


N = 400
RIGHT_IN_A = np.arange(N) % 2 == 0
RIGHT_IN_B = np.arange(N) % 4 != 3  # the half that is right in a, and a quarter more
SAMPLES = [
    Sample(f"s{number}", {"question": "x"}, "red", categories={"half": "first" if number < N // 2 else "second"})
    for number in range(N)
]
COUNTS = {"n": 100, "n_a": 100, "n_b": N}
IDS = [each.id for each in SAMPLES]


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    with patch.dict(LOADERS), patch.dict(METRICS):
        register()
        yield


def verdicts(values: np.ndarray) -> list[dict[str, float]]:
    return [{"accuracy": float(value)} for value in values]


def test_the_interval_of_a_mean_is_that_of_its_standard_error() -> None:
    found = figures(Exact(), SAMPLES, verdicts(RIGHT_IN_B))["accuracy"]
    error = math.sqrt(0.75 * 0.25 / N)
    assert (found["value"], found["n"]) == (0.75, N)
    assert found["low"] == pytest.approx(0.75 - 1.96 * error, abs=0.15 * error)
    assert found["high"] == pytest.approx(0.75 + 1.96 * error, abs=0.15 * error)


def test_samples_of_a_unit_are_resampled_together() -> None:
    """Four copies of each sample tell no more than one of each."""
    copies = [Sample(f"{each.id}-{copy}", {}, images=(each.id,)) for each in SAMPLES[:100] for copy in range(4)]
    scores = verdicts(RIGHT_IN_B[:100])
    together = figures(Exact(), copies, [each for each in scores for _ in range(4)])["accuracy"]
    assert together == {**figures(Exact(), SAMPLES[:100], scores)["accuracy"], "n": 400}


def test_the_difference_of_paired_samples_has_the_interval_of_its_own_spread() -> None:
    """A quarter of the samples differ: much narrower than two independent intervals."""
    found = differences(Exact(), SAMPLES, IDS, verdicts(RIGHT_IN_A), verdicts(RIGHT_IN_B))["accuracy"]
    error = math.sqrt(0.25 * 0.75 / N)  # of the share that only b has right
    assert (found["a"], found["b"], found["difference"], found["n"]) == (0.5, 0.75, 0.25, N)
    assert found["low"] == pytest.approx(0.25 - 1.96 * error, abs=0.15 * error)
    assert found["high"] == pytest.approx(0.25 + 1.96 * error, abs=0.15 * error)
    same = differences(Exact(), SAMPLES, IDS, verdicts(RIGHT_IN_A), verdicts(RIGHT_IN_A))["accuracy"]
    assert (same["difference"], same["low"], same["high"]) == (0, 0, 0)


def test_a_score_is_compared_where_both_runs_have_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model that draws only what is easy is not better for it."""
    easy, all_drawn = ([{"similarity": 0.9} if each < n else {} for each in range(N)] for n in (100, N))
    all_drawn[100:] = [{"similarity": 0.1}] * (N - 100)
    found = differences(Exact(), SAMPLES, IDS, easy, all_drawn)["similarity"]
    assert found == {**dict.fromkeys("ab", pytest.approx(0.9)), "difference": 0, "low": 0, "high": 0, **COUNTS}
    a, b = (result_of(tmp_path, name, RIGHT_IN_A, scores=scores) for name, scores in (("a", easy), ("b", all_drawn)))
    assert cli.main(["evaluate", "--compare", str(a), str(b)]) == 0
    assert "100 (a 100, b 400)" in capsys.readouterr().out


def test_compared_results_resample_units_together(tmp_path: Path) -> None:
    """Twenty questions about an image are no independent ones, though results have no images."""
    samples = [Sample(each.id, {}, "red", (f"{number % 20}.png",)) for number, each in enumerate(SAMPLES)]
    right = np.arange(N) % 20 < 15
    results = [
        read_result(result_of(tmp_path, name, verdict, samples)) for name, verdict in (("a", RIGHT_IN_A), ("b", right))
    ]
    images = [each.images[0] for each in samples]
    assert (
        compare(*results)["figures"]["accuracy"]
        == differences(Exact(), samples, images, verdicts(RIGHT_IN_A), verdicts(right))["accuracy"]
    )
    assert results[0]["answers"][23]["unit"] == "s3"


def test_the_f1_of_yes_is_resampled_at_once_as_one_by_one() -> None:
    """The counts of resampled samples give the same figures in one product; without any "yes" they are 0."""
    samples = [Sample(each.id, {}, "yes" if number % 3 else "no") for number, each in enumerate(SAMPLES)]
    tools = Tools(torch.device("cpu"), lambda: pytest.fail("no model"), Progress(desc="", total=N), Path())
    texts = ("yes", "no", "maybe", "yes", "no")
    scores = YesNo().score(samples, [Answer(texts[each % 5]) for each in range(N)], tools)

    class OneByOne(YesNo):
        def summarise(self, samples: Any, scores: Any) -> dict[str, float]:
            return super().summarise(samples, scores)

    at_once, slowly = figures(YesNo(), samples, scores), figures(OneByOne(), samples, scores)
    assert at_once == {name: pytest.approx(figure) for name, figure in slowly.items()}
    none = figures(YesNo(), samples, YesNo().score(samples, [Answer("no")] * N, tools))
    assert [none[name]["high"] for name in ("precision", "recall", "f1")] == [0, 0, 0]


@dataclass(frozen=True)
class Largest(Exact):
    """The means, and a figure that is none."""

    def summarise(self, samples: Any, scores: Any) -> dict[str, float]:
        return {**super().summarise(samples, scores), "largest": max(each["accuracy"] for each in scores)}


def test_figures_that_are_no_means_are_resampled_as_a_whole() -> None:
    """And means in one product are those of Python's loops; a score that only two samples have is often missing."""
    scores = verdicts(np.arange(N))
    scores[3]["rare"], scores[4]["rare"] = 1.0, 2.0
    found, means = figures(Largest(), SAMPLES, scores), figures(Exact(), SAMPLES, scores)
    largest = found.pop("largest")
    assert largest["value"] == largest["high"] == N - 1
    assert N - 8 < largest["low"] < N - 1
    assert found.keys() == means.keys() == {"accuracy", "rare"}
    for name, figure in means.items():
        assert figure == {key: pytest.approx(value) for key, value in found[name].items()}
    assert means["rare"] == {"value": 1.5, "low": 1.0, "high": 2.0, "n": 2}


def result_of(
    folder: Path,
    name: str,
    right: np.ndarray,
    samples: list[Sample] = SAMPLES,
    scores: list[dict[str, float]] | None = None,
    **spec: Any,
) -> Path:
    """A result folder without a model: answers `red` and `blue`."""
    made = read_spec(str(write_spec(folder / "asks.yaml", **spec)))
    answers = [Answer("red" if value else "blue") for value in right]
    scores = verdicts(right) if scores is None else scores
    run = {
        "model": {"name": name, "sha256": name * 32},
        "visualizer": None,
        "data": {"path": "x", "limit": None},
        "dtype": "auto",
        "device": "cpu",
    }
    (folder / name).mkdir()
    write_result(make_result(made, samples, answers, scores, {"distinct": 2 / len(samples)}, run), folder / name)
    return folder / name


def test_compared_results_show_what_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    better, worse = RIGHT_IN_B.copy(), RIGHT_IN_A.copy()
    better[0] = False  # and one sample is lost
    a, b = result_of(tmp_path, "a", worse), result_of(tmp_path, "b", better, prompt="Answer: {question}")
    output = tmp_path / "out" / "difference.json"
    assert cli.main(["evaluate", "--compare", str(a), str(b / "result.json"), "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "right in a, wrong in b (accuracy): 1 (s0)" in printed
    assert "wrong in a, right in b (accuracy): 100 (s1, s5, s9, s13, s17, …)" in printed
    assert "spec.content.prompt: {question} in a, Answer: {question} in b" in printed
    found = json.loads(output.read_text(encoding="utf-8"))
    assert found["figures"]["accuracy"]["difference"] == pytest.approx(99 / N)
    assert "low" not in found["figures"]["distinct"]
    assert found["categories"]["half"]["second"]["accuracy"]["difference"] == pytest.approx(50 / 200)
    assert found["differs"].keys() == {"model.name", "model.sha256", "spec.sha256", "spec.content.prompt"}
    assert output.with_suffix(".png").is_file()
    assert cli.main(["evaluate", "--compare", str(a), str(a)]) == 0
    assert "nothing else differs: model, data, spec and versions are the same" in capsys.readouterr().out


def test_a_plot_that_fails_costs_no_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    result = read_result(result_of(tmp_path, "a", RIGHT_IN_A)) | {"headline": "recall"}
    monkeypatch.setattr("metamorph.evaluation.benchmarks.run.run_spec", lambda *_, **__: result)
    words = [str(tmp_path / "asks.yaml"), "--model", "mini", "--output-dir", str(tmp_path / "a")]
    assert cli.main(["evaluate", *words]) == 2
    printed = capsys.readouterr()
    assert "0.5000" in printed.out
    assert "there is no plot, because no sample has recall" in printed.err


def test_results_with_a_limit_are_compared_on_their_common_samples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = read_result(result_of(tmp_path, "a", RIGHT_IN_A))
    b = read_result(result_of(tmp_path, "b", RIGHT_IN_B[:100], SAMPLES[:100]))
    found = compare(a, b)
    assert (found["samples"], found["only_in_a"], found["only_in_b"]) == (100, 300, 0)
    assert cli.main(["evaluate", "--compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert "compared: the 100 samples of both, without 300 of one of them" in capsys.readouterr().out
    assert found["figures"].keys() == {"accuracy"}  # the figure of all samples is of other ones


def test_results_of_something_else_are_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = read_result(result_of(tmp_path, "a", RIGHT_IN_A))
    others = [Sample(f"t{number}", {"question": "x"}, "red") for number in range(4)]
    with pytest.raises(ValueError, match="asks and asks have no sample in common"):
        compare(a, read_result(result_of(tmp_path, "b", RIGHT_IN_A[:4], others)))
    others = [Sample(each.id, {"question": "y"}, "red") for each in SAMPLES[:4]]
    with pytest.raises(ValueError, match="of different data: sample s0 is not the same in both"):
        compare(a, read_result(result_of(tmp_path, "c", RIGHT_IN_A[:4], others)))
    metric = {"name": "exact", "needed": "answer"}
    with pytest.raises(ValueError, match="the results have different metrics"):
        compare(a, read_result(result_of(tmp_path, "d", RIGHT_IN_A, metric=metric)))
    (tmp_path / "e.json").write_text("{}")
    assert cli.main(["evaluate", "--compare", str(tmp_path / "a"), str(tmp_path / "e.json")]) == 2
    assert "e.json is not a result.json of `metamorph evaluate SPEC`" in capsys.readouterr().err
    assert cli.main(["evaluate", "--compare", str(tmp_path / "a"), str(tmp_path / "none")]) == 2
    assert "none does not exist" in capsys.readouterr().err


def test_lower_is_better_for_some_figures(tmp_path: Path) -> None:
    class Distance(Exact):
        headline: ClassVar[str] = "accuracy"
        lower_is_better: ClassVar[bool] = True

    results = [read_result(result_of(tmp_path, name, right)) for name, right in (("a", RIGHT_IN_A), ("b", RIGHT_IN_B))]
    with patch("metamorph.evaluation.benchmarks.compare.build", lambda *_: Distance()):
        found = compare(*results)
    assert (len(found["changes"]["better"]), len(found["changes"]["worse"])) == (0, 100)


def test_plots_have_a_row_for_each_category(tmp_path: Path) -> None:
    paths = [result_of(tmp_path, name, right) for name, right in (("a", RIGHT_IN_A), ("b", RIGHT_IN_B))]
    results = [read_result(path) for path in paths]
    save_result(results[0], tmp_path / "three.png")
    save_result({**results[0], "categories": {}}, tmp_path / "one.png")
    save_comparison(compare(*results), tmp_path / "comparison.png")
    with Image.open(tmp_path / "three.png") as three, Image.open(tmp_path / "one.png") as one:
        assert three.height > one.height
    with pytest.raises(ValueError, match="there is no plot, because no sample has recall"):
        save_result({**results[0], "headline": "recall"}, tmp_path / "none.png")
    odd = [replace(each, categories={"half": "$\\foo$ a|b\nc"}) for each in SAMPLES[:4]]
    folder = result_of(tmp_path, "odd", RIGHT_IN_A[:4], odd)
    save_result(read_result(folder), tmp_path / "odd.png")  # no mathematics
    lines = (folder / "table.md").read_text(encoding="utf-8").splitlines()
    assert lines[-1].startswith("| accuracy, half $\\foo$ a\\|b c | 0.5000 |")
    with Image.open(tmp_path / "comparison.png") as image:
        assert len(image.convert("RGB").getcolors(2**20)) > 20
