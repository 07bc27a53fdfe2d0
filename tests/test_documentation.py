"""What README and documentation tell users to type exists."""

from __future__ import annotations

import io
import re
import shlex
from contextlib import redirect_stdout
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

from metamorph import cli


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
            assert word.split("=")[0] in known, f"{page}: metamorph {command} has no flag {word}"


@pytest.mark.parametrize(("page", "words"), documented_commands(), ids=str)
def test_no_documented_training_writes_into_the_quickstarts_folder(page: str, words: tuple[str, ...]) -> None:
    command, *rest = words
    for flag, value in pairwise(rest):
        if command.startswith("train") and flag == "--output_dir":
            assert not value.startswith("out/"), f"{page}: metamorph {command} would write into {value}"


def test_training_pages_and_scripts_leave_the_quickstarts_folder_alone() -> None:
    for path in (ROOT / "visualization/train_1node.sh", ROOT / "visualization/Train_Visualization.md"):
        assert not re.search(r"\bout/", path.read_text(encoding="utf-8")), path


@cache
def flags_of(command: str) -> frozenset[str]:
    """The flags that `metamorph COMMAND --help` lists."""
    printed = io.StringIO()
    with redirect_stdout(printed), pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    return frozenset(re.findall(r"--[\w-]+", printed.getvalue()))


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
