"""What the quickstart refuses before it starts, and what it clears away."""

import re
import sys

import pytest

from metamorph.cli import main
from metamorph.flags.extras import install_command
from metamorph.miniature.quickstart.options import (
    MARKER_FILE,
    QuickstartOptions,
    clear_output,
    require_extras,
    thread_count,
)


def test_missing_extras_are_named_with_the_command_that_installs_them(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "diffusers", None)  # what the import system keeps for a module that is not there
    with pytest.raises(ValueError, match="needs diffusers: " + re.escape(install_command("quickstart"))):
        require_extras()
    assert main(["quickstart", "--fast"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert install_command("quickstart") in error


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(NotADirectoryError, match=r"thesis.tex, which the quickstart did not make"):
        QuickstartOptions(output_dir=tmp_path)


def test_bad_values_name_their_flag(tmp_path):
    with pytest.raises(ValueError, match="--seed -1"):
        QuickstartOptions(output_dir=tmp_path, seed=-1)
    with pytest.raises(FileNotFoundError, match=r"--assets-dir .* lacks mini-siglip, mini-llama, mini-sd"):
        QuickstartOptions(output_dir=tmp_path / "out", assets_dir=tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file"):
        QuickstartOptions(output_dir=tmp_path / "file")


def test_an_earlier_run_is_cleared_away(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").write_text("")
    (tmp_path / "metrics.json").write_text("{}")
    # The names alone are no proof: somebody may keep a model of their own in out/model.
    with pytest.raises(NotADirectoryError, match=r"metrics.json, model, which the quickstart did not make"):
        QuickstartOptions(output_dir=tmp_path)
    (tmp_path / MARKER_FILE).touch()
    assert QuickstartOptions(output_dir=tmp_path).output_dir == tmp_path
    clear_output(tmp_path)
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
