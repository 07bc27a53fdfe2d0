"""Walks the parameter tables of the training guide: every flag exists and has the stated default."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from metamorph.flags.recipes import RecipeParser, parse_arguments
from metamorph.recipes import find_recipe
from metamorph.training.arguments import DataArguments, MetaMorphTrainingArguments, ModelArguments


TYPES = (ModelArguments, DataArguments, MetaMorphTrainingArguments)
TABLES = json.loads((Path(__file__).parent / "guide_flags.json").read_text(encoding="utf-8"))
GUIDE: dict[str, Any] = {}
for table in TABLES.values():
    GUIDE |= table if isinstance(table, dict) else {}
STAGES = {"pretraining": True, "finetuning": False}
"""Stage -> `tune_mm_mlp_adapter`, the flag that the guide tells the stages apart by."""
REQUIRED = ("model_name_or_path", "output_dir", "data_path")
"""The guide has a placeholder for them, and a run is impossible without."""
RENAMED = {"use_vision_ar": "resolved_use_vision_ar"}
"""Flags whose default depends on the stage -> where the value that counts is."""


@pytest.fixture
def needed(tmp_path: Path) -> dict[str, str]:
    """The flags without which nothing parses."""
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "connector").mkdir()
    (tmp_path / "data.jsonl").write_text("")
    return {
        "model_name_or_path": str(tmp_path / "llm"),
        "data_path": str(tmp_path / "data.jsonl"),
        "output_dir": str(tmp_path / "out"),
    }


def parse(flags: dict[str, Any], stage: str, tmp_path: Path) -> tuple[Any, ...]:
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    if stage == "pretraining":
        words += ["--tune_mm_mlp_adapter", "True"]
    else:  # its default; the connector must be there
        words += ["--pretrain_mm_mlp_adapter", str(tmp_path / "connector")]
    return parse_arguments(TYPES, words)


def value_of(name: str, parsed: tuple[Any, ...]) -> Any:
    name = RENAMED.get(name, name)
    return next(getattr(part, name) for part in parsed if hasattr(part, name))


def test_the_tables_are_there() -> None:
    assert len(TABLES) == 9  # a comment and eight tables
    assert len(GUIDE) == 27


@pytest.mark.parametrize("name", GUIDE)
def test_flag_exists_and_is_explained(name: str) -> None:
    action = RecipeParser(TYPES).actions.get(name)
    assert action is not None, f"the guide's flag --{name} is missing"
    assert action.help, f"--{name} has no help text"


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", [name for name, default in GUIDE.items() if default is not None])
def test_default_is_the_guides(name: str, stage: str, needed: dict[str, str], tmp_path: Path) -> None:
    stated = GUIDE[name][stage] if isinstance(GUIDE[name], dict) else GUIDE[name]
    value = value_of(name, parse(needed, stage, tmp_path))
    assert value == stated
    assert type(value) is type(stated) or name == "lr_scheduler_type"  # an enum of strings


@pytest.mark.parametrize("name", REQUIRED)
def test_placeholder_of_the_guide_is_required(name: str, needed: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=name):
        parse({key: value for key, value in needed.items() if key != name}, "pretraining", tmp_path)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("size", ["llama3.1-8b", "llama3.1-8b-24gb"])
def test_recipes_hold_what_the_guide_states(size: str, stage: str) -> None:
    """A recipe may add to the guide, and says so where it must differ from it."""
    number = 1 if STAGES[stage] else 2
    text = find_recipe(f"{size}-stage{number}").read_text(encoding="utf-8")
    for name, value in yaml.safe_load(text).items():
        if GUIDE.get(name) is None:
            continue
        stated = GUIDE[name][stage] if isinstance(GUIDE[name], dict) else GUIDE[name]
        line = next(line for line in text.splitlines() if line.startswith(f"{name}:"))
        assert value == stated or "not the guide's" in line, line
