"""What README and documentation tell users to type exists."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import io
import re
import shlex
import sys
from contextlib import redirect_stdout
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image

from metamorph import cli
from metamorph.recipes import find_recipe


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "visualization").glob("*.md"))]
CODE_BLOCK = re.compile(r"^ *```bash\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"(?:^|\s|/)metamorph (?P<words>[a-z].*)")
LINK = re.compile(r"\]\((?!https?:|#)(?P<path>[^)#]+\.md)")


def documented_commands() -> list[tuple[str, tuple[str, ...]]]:
    """Page and words of every `metamorph …` line in a bash block, continued lines joined."""
    commands = []
    for page in PAGES:
        for block in CODE_BLOCK.findall(page.read_text(encoding="utf-8")):
            for line in block.replace("\\\n", " ").splitlines():
                if match := COMMAND.search(line.split(" # ")[0].split("   #")[0]):
                    words = tuple(word for word in shlex.split(match["words"]) if word != "…")
                    commands.append((page.name, words))
    return commands


@pytest.mark.parametrize(("page", "words"), documented_commands(), ids=str)
def test_documented_flags_exist(page: str, words: tuple[str, ...]) -> None:
    command, *rest = words
    assert command in cli.COMMANDS
    known = flags_of(command)
    for word in rest:
        if word.startswith("--"):
            assert word.split("=")[0].replace("_", "-") in known, f"{page}: metamorph {command} has no flag {word}"


@pytest.mark.parametrize(("page", "words"), documented_commands(), ids=str)
def test_no_documented_training_writes_into_the_quickstarts_folder(page: str, words: tuple[str, ...]) -> None:
    command, *rest = words
    for flag, value in pairwise(rest):
        if command.startswith("train") and flag == "--output_dir":
            assert not value.startswith("out/"), f"{page}: metamorph {command} would write into {value}"


@pytest.mark.parametrize(("page", "words"), documented_commands(), ids=str)
def test_documented_trainings_have_a_learning_rate(page: str, words: tuple[str, ...]) -> None:
    """Transformers' default suits no stage: a recipe has a better one."""
    if words[0] == "train":
        assert {"--config", "--learning_rate"} & set(words), f"{page}: {' '.join(words)}"
    for flag, value in pairwise(words):
        if flag == "--config" and "/" not in value and not value.endswith((".yaml", ".yml")):
            assert find_recipe(value).is_file(), f"{page}: {value} is not a recipe"
        assert "recipes/llama" not in value, f"{page}: the clone has no folder {value}"


def test_training_pages_and_scripts_leave_the_quickstarts_folder_alone() -> None:
    for path in (ROOT / "visualization/train_1node.sh", ROOT / "visualization/Train_Visualization.md"):
        assert not re.search(r"\bout/", path.read_text(encoding="utf-8")), path


@cache
def flags_of(command: str) -> frozenset[str]:
    """The flags that `metamorph COMMAND --help` lists, with dashes: underscores are the same."""
    printed = io.StringIO()
    with redirect_stdout(printed), pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    return frozenset(flag.replace("_", "-") for flag in re.findall(r"--[\w-]+", printed.getvalue()))


def test_readme_links_to_pages_that_exist() -> None:
    links = LINK.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    assert links
    assert [link for link in links if not (ROOT / link).is_file()] == []


def test_package_offers_its_main_classes() -> None:
    import metamorph

    for name in metamorph.__all__:
        assert getattr(metamorph, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'MetaMorph'"):
        _ = metamorph.MetaMorph


PACKAGES = sorted((ROOT / "src" / "metamorph").rglob("__init__.py"))


@pytest.mark.parametrize("init", PACKAGES, ids=lambda init: init.parent.name)
def test_reading_orders_name_every_file(init: Path) -> None:
    """The docstring of a package says what is answered where, and leaves out no file."""
    doc = ast.get_docstring(ast.parse(init.read_text(encoding="utf-8"))) or ""
    named = set(re.findall(r"`([\w/]+(?:\.py|/))`", doc))
    assert [name for name in named if not (init.parent / name).exists()] == []
    if "Old import path" in doc or init.parent.name == "cli":
        return
    old = {file.name for file in init.parent.glob("*.py") if "Old import path" in file.read_text(encoding="utf-8")}
    files = {file.name for file in init.parent.glob("*.py")} - {"__init__.py", "__main__.py"} - old
    packages = {file.parent.name for file in init.parent.glob("*/__init__.py")} - {"quickstart"} | (
        {"quickstart"} if init.parent.name == "miniature" else set()
    )
    assert (files | packages) - {part for name in named for part in Path(name).parts} == set()


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ("metamorph.visualization.train", "metamorph.visualizer_training.run", "train_visualizer"),
        ("metamorph.visualization.arguments", "metamorph.visualizer_training.arguments", "VisualizerArguments"),
        ("metamorph.quickstart.run", "metamorph.miniature.quickstart.run", "run_quickstart"),
        ("metamorph.quickstart.world", "metamorph.miniature.world", "judge"),
        ("metamorph.quickstart.assets", "metamorph.mini", "asset_path"),
    ],
)
def test_old_import_paths_warn(old: str, new: str, name: str) -> None:
    for module in [module for module in sys.modules if module == old or module == "metamorph.quickstart"]:
        del sys.modules[module]  # a warning is given once, at the first import
    with pytest.warns(DeprecationWarning, match=f"{old} has moved to {new}"):
        moved = importlib.import_module(old)
    assert getattr(moved, name) is getattr(importlib.import_module(new), name)


def test_every_module_that_is_named_exists() -> None:
    """In imports of scripts that no other test runs, and in the pages of the API."""
    named: dict[str, list[str]] = {}
    for folder in ("benchmarks", "examples", "tools", "tests", "docs"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("metamorph"):
                    named.setdefault(node.module, []).append(str(file.relative_to(ROOT)))
    for page in (ROOT / "docs").rglob("*.md"):
        for module in re.findall(r"^::: (metamorph[a-z_.]*)$", page.read_text(encoding="utf-8"), re.MULTILINE):
            named.setdefault(module, []).append(page.name)
    gone = {module: where for module, where in named.items() if importlib.util.find_spec(module) is None}
    assert gone == {}


def test_the_example_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})
    with Image.open(tmp_path / "circle.png") as picture:
        assert picture.size == (64, 64)
