"""What the package is called, what a wheel holds beside the code, which releases it admits, and what the CI runs."""

import ast
import glob
import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import metamorph
import metamorph.mini as assets
from metamorph.cli import main
from metamorph.evaluation.benchmarks.spec import shipped_specs
from metamorph.recipes import shipped_recipes


tomllib = pytest.importorskip("tomllib", reason="part of Python from 3.11 on")


ROOT = Path(__file__).parents[1]
EXTRA = r"([\w,-]+)"


def settings() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def tracked_texts() -> dict[str, str]:
    """The text files that git tracks, by their paths."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    suffixes = {"", ".cfg", ".md", ".py", ".sh", ".toml", ".txt", ".yaml", ".yml"}
    names = [name for name in listed.split("\0") if name and Path(name).suffix in suffixes and (ROOT / name).is_file()]
    return {name: (ROOT / name).read_text(encoding="utf-8") for name in names}


def test_nobody_is_told_to_install_the_stranger_that_pypi_calls_metamorph() -> None:
    wrong = re.compile(r"(?<![\w/-])metamorph\[[a-z][a-z,]*\]|pip3? install [^\n`]*(?<![\w/.-])metamorph(?![\w/.-])")
    found = {name: wrong.findall(text) for name, text in tracked_texts().items()}
    assert {name: words for name, words in found.items() if words} == {}


def test_extras_that_are_named_exist() -> None:
    known = set(settings()["project"]["optional-dependencies"])
    forms = (rf'install_command\("{EXTRA}"\)', rf"metamorph-vpit\[{EXTRA}\]", rf"pip install [^\n`]*\.\[{EXTRA}\]")
    for name, text in tracked_texts().items():
        named = {extra for form in forms for found in re.findall(form, text) for extra in found.split(",")}
        assert named <= known, name


def test_the_version_is_written_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert settings()["project"]["dynamic"] == ["version"]
    assert settings()["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "metamorph.__version__"}
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"metamorph {metamorph.__version__}\n"


@pytest.mark.parametrize(("package", "names"), [("recipes", shipped_recipes), ("evaluation", shipped_specs)])
def test_a_wheel_ships_the_recipes_and_specs(package: str, names: Callable[[], Mapping[str, object]]) -> None:
    folder = Path(metamorph.__file__).parent / package
    patterns = settings()["tool"]["setuptools"]["package-data"][f"metamorph.{package}"]
    found = {Path(name) for pattern in patterns for name in glob.glob(pattern, root_dir=folder)}
    assert {file.stem for file in found if file.suffix == ".yaml"} == set(names())


def test_entry_points_name_functions_that_exist() -> None:
    """lmms-eval, which is not installed, only warns if it cannot load one."""
    for group in settings()["project"]["entry-points"].values():
        for target in group.values():
            module, _, function = target.partition(":")
            tree = ast.parse((ROOT / "src" / module.replace(".", "/")).with_suffix(".py").read_text(encoding="utf-8"))
            assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, target


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
    pinned = pins()
    refused = [each for each in requirements() if pinned.get(canonicalize_name(each.name), "") not in each.specifier]
    assert [each for each in refused if each.name != settings()["project"]["name"]] == []


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info < (3, 11), reason="many of the pinned releases need Python 3.11")
def test_all_extras_stand_beside_each_other_with_the_pinned_releases(tmp_path: Path) -> None:
    """What is installed counts as chosen: in the CI it is what `make` installed with these constraints."""
    pytest.importorskip("pip")
    extras, report = ",".join(settings()["project"]["optional-dependencies"]), tmp_path / "report.json"
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--report", str(report)]
    command += ["-c", "constraints.txt", "-e", f".[{extras}]"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode and "connection broken by" in done.stderr:
        pytest.skip("the package index cannot be reached")
    assert done.returncode == 0, done.stderr
    chosen = {canonicalize_name(each["metadata"]["name"]) for each in json.loads(report.read_text())["install"]}
    own = re.compile("metamorph-vpit|triton|(nvidia|cuda)-.*")  # itself, and what the build of PyTorch chooses
    assert [name for name in chosen - set(pins()) if not own.fullmatch(name)] == []


def test_the_ci_runs_actions_of_fixed_commits_that_can_only_read() -> None:
    for file in (ROOT / ".github" / "workflows").glob("*.yml"):
        text = file.read_text(encoding="utf-8")
        actions = re.findall(r"uses: (\S+)", text)
        assert actions
        assert [action for action in actions if not re.fullmatch(r"\S+@[0-9a-f]{40}", action)] == []
        assert "permissions:\n  contents: read\n" in text
