"""Specs: every key, name and type is checked with an error that names the file, the key and what is expected."""

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from benchmark_parts import Lines, register, write_questions, write_spec

from metamorph import cli
from metamorph.evaluation.benchmarks.spec import find_spec, read_spec, shipped_specs, some_of
from metamorph.evaluation.loaders import LOADERS
from metamorph.evaluation.metrics import METRICS
from metamorph.evaluation.options import read_options
from metamorph.evaluation.samples import Sample


SHIPPED = {"loaders": dict(LOADERS), "metrics": dict(METRICS)}


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    with patch.dict(LOADERS), patch.dict(METRICS):
        register()
        yield


BAD: list[tuple[dict[str, Any], str]] = [
    ({"promt": "x"}, "has no key 'promt' (did you mean 'prompt'?); its keys are data, prompt, metric"),
    ({"metric": None}, "needs the key 'metric'"),
    ({"prompt": 3}, "prompt must be text, not 3"),
    ({"prompt": " "}, "prompt is empty"),
    ({"seed": -1}, "seed must be a whole number, at least 0, not -1"),
    ({"seed": True}, "seed must be a whole number, not True"),
    ({"data": {"path": "x"}}, "data needs the key 'loader', which is one of"),
    ({"data": {"loader": "lins"}}, "data: 'lins' is unknown: use one of"),
    ({"data": {"loader": "lines", "kind": ["a"]}}, "data lines has no key 'kind' (did you mean 'kinds'?)"),
    ({"data": {"loader": "lines", "kinds": [1]}}, "data lines: an item of kinds must be text, not 1"),
    ({"data": {"loader": "lines", "kinds": "a"}}, "kinds must be a list, each item text, not 'a'"),
    ({"data": {"loader": "lines", "names": {"a": 1}}}, "names.a must be text, not 1"),
    ({"data": {"loader": "lines", "order": "random"}}, "order must be one of file, reversed, not 'random'"),
    ({"data": {"loader": "lines", "most": 1.5}}, "most must be a whole number or null, not 1.5"),
    ({"data": {"loader": "lines", "path": 3}}, "path of data must be text, not 3"),
    ({"metric": {"name": "exat"}}, "metric: 'exat' is unknown: use one of"),
    ({"metric": "exact"}, "metric must be a mapping"),
    ({"metric": {"needed": "x"}}, "metric must be a mapping with a name, which is one of"),
    ({"decoding": {"temprature": 1}}, "decoding has no key 'temprature' (did you mean 'temperature'?)"),
    ({"decoding": {"top_p": 0.5}}, "decoding: top_p and top_k have no effect without a temperature"),
    ({"decoding": {"temperature": 1, "top_p": 2}}, "decoding: top_p must be above 0 and at most 1"),
    ({"decoding": {"steps": 0}}, "decoding: steps must be a whole number, at least 1, not 0"),
    ({"decoding": {"draw": "yes please"}}, "decoding: draw must be true or false, not 'yes please'"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[message[:50] for _, message in BAD])
def test_what_is_wrong_with_a_spec_is_said(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = write_spec(tmp_path / "own.yaml", **changes)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_spec(str(file))
    assert str(error.value).startswith(str(file))


def test_options_become_what_the_class_declares() -> None:
    options = {"kinds": ["a", "b"], "names": {"a": "b"}, "shift": 1, "most": None}
    made = read_options(Lines, options, "data")
    assert made == Lines(("a", "b"), {"a": "b"}, 1.0)
    assert isinstance(made.shift, float)


def test_a_file_that_is_no_spec_is_said(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("a: [")
    with pytest.raises(ValueError, match=r"own\.yaml cannot be read as a spec: it is not valid YAML"):
        read_spec(str(file))
    file.write_text("- 1")
    with pytest.raises(ValueError, match=r"own\.yaml must be a mapping, not \[1\]"):
        read_spec(str(file))


def test_data_that_do_not_fit_the_prompt_are_refused(tmp_path: Path) -> None:
    data = write_questions(tmp_path)
    spec = read_spec(str(write_spec(tmp_path / "own.yaml", prompt="{qestion} {question}")))
    message = r"the prompt of own names {qestion}, but sample q0 of .*questions\.jsonl has question: did you mean"
    with pytest.raises(ValueError, match=message):
        spec.load(data)
    spec = read_spec(str(write_spec(tmp_path / "own.yaml", source="https://a.org (MIT)")))
    with pytest.raises(FileNotFoundError, match=r"own needs --data-path, its data from https://a\.org \(MIT\)"):
        spec.load()
    with pytest.raises(FileNotFoundError, match="none does not exist: give the data of own as --data-path"):
        spec.load(tmp_path / "none")
    data.write_text(data.read_text() * 2)
    with pytest.raises(ValueError, match="two samples have the id 'q0'"):
        spec.load(data)


def test_data_are_found_next_to_an_own_spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_questions(tmp_path)
    write_spec(tmp_path / "own.yaml", data={"loader": "lines", "path": "questions.jsonl"})
    monkeypatch.chdir(tmp_path.parent)
    spec = read_spec(f"{tmp_path.name}/own.yaml")
    assert len(spec.load()) == 12
    braces = Sample("0", {"question": " {x} "})  # braces of a question are its own
    assert spec.prompt_of(braces) == "{x}"


def test_the_hash_is_that_of_the_content(tmp_path: Path) -> None:
    file = write_spec(tmp_path / "own.yaml")
    before = read_spec(str(file)).sha256
    file.write_text(f"# a comment\n{file.read_text()}")
    assert read_spec(str(file)).sha256 == before
    assert read_spec(str(write_spec(file, seed=1))).sha256 != before


def test_a_limit_takes_evenly_spaced_units(tmp_path: Path) -> None:
    spec = read_spec(str(write_spec(tmp_path / "own.yaml")))
    pairs = [Sample(str(number), {}, images=(str(number // 2),)) for number in range(12)]
    alone = [Sample(str(number), {}) for number in range(12)]
    assert [number for number, _ in some_of(alone, spec.metric, 4)] == [0, 3, 6, 9]
    assert [number for number, _ in some_of(pairs, spec.metric, 4)] == [0, 1, 6, 7]  # both questions of an image
    assert some_of(alone, spec.metric, 100) == list(enumerate(alone))


def test_an_unknown_benchmark_suggests_the_nearest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("metamorph.evaluation.benchmarks.spec.FOLDER", tmp_path)
    write_spec(tmp_path / "mmvp.yaml", description="pairs", source="https://a.org (MIT)")
    assert find_spec("mmvp") == tmp_path / "mmvp.yaml"
    assert cli.main(["evaluate", "mmpv", "--model", "mini"]) == 2
    assert "mmpv is neither a file nor the name of a benchmark: did you mean 'mmvp'?" in capsys.readouterr().err
    assert cli.main(["evaluate", "wrld", "--model", "mini"]) == 2
    assert "did you mean 'world'?" in capsys.readouterr().err
    assert cli.main(["evaluate", "--model", "mini", "--limit", "3", "mmpv"]) == 2
    assert "did you mean 'mmvp'" in capsys.readouterr().err
    assert cli.main(["evaluate", "--model", "mini", "world"]) == 2
    assert "world comes before its flags: metamorph evaluate world" in capsys.readouterr().err
    assert cli.main(["evaluate", "--list"]) == 0
    assert capsys.readouterr().out == "mmvp  pairs\n      https://a.org (MIT)\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "say what to evaluate: a benchmark (metamorph evaluate --list), or world, loss, visualizer"),
        (["--list", "world"], "--list and 'world': give one of them"),
        (["--compare", "a", "b", "world"], "--compare and 'world': give one of them"),
        (["--output", "a.json", "--list"], "--output a.json needs --compare, two results"),
        (["--compare", "a"], "--compare expected 2 arguments"),
    ],
)
def test_words_without_effect_are_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", *words]) == 2
    assert message in capsys.readouterr().err


def test_what_is_listed_exists() -> None:
    for registry in SHIPPED.values():
        for name, place in registry.items():
            module, _, attribute = place.partition(":")
            assert getattr(importlib.import_module(module), attribute).name == name
    for name, content in shipped_specs().items():
        spec = read_spec(name)
        assert spec.path is None or spec.path.is_file()
        assert content["description"]
        assert content["source"]
