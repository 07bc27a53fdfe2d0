"""What a wheel holds beside the code, which releases of other packages it admits, and what the CI runs."""

import glob
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import metamorph.mini as assets


tomllib = pytest.importorskip("tomllib", reason="part of Python from 3.11 on")


ROOT = Path(__file__).parents[1]


def settings() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_a_wheel_ships_all_files_of_the_assets_and_nothing_else() -> None:
    package = Path(assets.__file__).parent
    shipped = {
        Path(found)
        for pattern in settings()["tool"]["setuptools"]["package-data"]["metamorph.mini"]
        for found in glob.glob(pattern, root_dir=package, recursive=True)
        if (package / found).is_file()
    }
    wanted = {
        path.relative_to(package)
        for folder in assets.ASSETS
        for path in (package / folder).rglob("*")
        if path.is_file()
    }
    assert shipped == wanted
    assert {path.parts[0] for path in shipped} == set(assets.ASSETS)


def requirements() -> list[Requirement]:
    project = settings()["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    return [Requirement(text) for group in groups for text in group]


@pytest.mark.parametrize(
    ("name", "release"),
    [("diffusers", "0.37.1"), ("peft", "0.19.1"), ("jinja2", "3.1.5")],
)
def test_releases_that_run_code_of_model_folders_are_not_admitted(name: str, release: str) -> None:
    admitting = [each.specifier.contains(release) for each in requirements() if each.name == name]
    assert admitting == [False]


def test_pinned_releases_are_admitted() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.lower().split("==") for line in lines if not line.startswith("#"))
    refused = [each for each in requirements() if each.name in pinned and pinned[each.name] not in each.specifier]
    assert refused == []


def test_the_ci_runs_actions_of_fixed_commits_that_can_only_read() -> None:
    for file in (ROOT / ".github" / "workflows").glob("*.yml"):
        text = file.read_text(encoding="utf-8")
        actions = re.findall(r"uses: (\S+)", text)
        assert actions
        assert [action for action in actions if not re.fullmatch(r"\S+@[0-9a-f]{40}", action)] == []
        assert "permissions:\n  contents: read\n" in text
