"""What the quickstart refuses before it starts, and what it clears away."""

import re
import sys
from pathlib import Path

import pytest

from metamorph.cli import main
from metamorph.flags.extras import install_command
from metamorph.miniature.quickstart.workspace import MARKER_FILE, open_workspace, require_extras, thread_count


def test_missing_extras_are_named_with_the_command_that_installs_them(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "diffusers", None)  # what the import system keeps for a missing module
    with pytest.raises(ValueError, match="needs diffusers: " + re.escape(install_command("quickstart"))):
        require_extras()
    assert main(["quickstart", "--fast"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert install_command("quickstart") in error


@pytest.mark.parametrize(
    ("file", "output", "assets", "message"),
    [
        ("thesis.tex", "", None, r"thesis.tex, which the quickstart did not create"),
        ("file", "file", None, "--output-dir .*file cannot be written to: .* is a file"),
        ("file", "out", "", r"--assets-dir .* lacks mini-siglip, mini-llama, mini-sd"),
    ],
)
def test_bad_folders_name_their_flag(file: str, output: str, assets: str | None, message: str, tmp_path: Path) -> None:
    (tmp_path / file).write_text("years of work")
    with pytest.raises((NotADirectoryError, FileNotFoundError), match=message):
        open_workspace(tmp_path / output, None if assets is None else tmp_path / assets)


def test_an_earlier_run_is_cleared_away(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").write_text("")
    (tmp_path / "metrics.json").write_text("{}")
    # The names alone prove nothing: somebody may have a model of their own in out/model.
    with pytest.raises(NotADirectoryError, match=r"metrics.json, model, which the quickstart did not create"):
        open_workspace(tmp_path)
    (tmp_path / MARKER_FILE).touch()
    open_workspace(tmp_path).clear()
    assert [path.name for path in tmp_path.iterdir()] == [MARKER_FILE]


def test_threads_follow_the_environment(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert thread_count() == 3
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert 1 <= thread_count() <= 4


def test_a_package_without_assets_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("metamorph.mini.__file__", str(tmp_path / "__init__.py"))
    assert main(["quickstart", "--fast", "--output-dir", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "mini-siglip is not in" in error
    assert not (tmp_path / "out").exists()
