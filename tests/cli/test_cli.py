"""The `metamorph` command around its subcommands: exit statuses, messages, and what is not printed."""

import logging
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

from metamorph import cli
from metamorph.flags.extras import install_command
from metamorph.flags.recipes import read_recipe
from metamorph.recipes import find_recipe, shipped_recipes


def subcommand(error: BaseException) -> ModuleType:
    """A subcommand that fails."""

    def main(argv: Sequence[str]) -> None:
        raise error

    module = ModuleType("failing")
    vars(module)["main"] = main
    return module


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch):
    """Make `metamorph lr` raise an error."""

    def replace(error: BaseException) -> None:
        monkeypatch.setitem(sys.modules, "metamorph.cli.lr", subcommand(error))

    return replace


def test_a_missing_package_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path
) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # how the import system marks a missing module
    (tmp_path / "data.jsonl").write_text("")
    words = ["train", "--model_name_or_path", "owner/llm", "--data_path", str(tmp_path / "data.jsonl")]
    flags = ["--tune_mm_mlp_adapter", "True", "--output_dir", str(tmp_path), "--bf16", "False", "--sharding", "zero2"]
    assert cli.main([*words, *flags]) == 2
    message = "metamorph train: error: --sharding zero2 needs DeepSpeed: " + install_command("deepspeed")
    assert capsys.readouterr().err.startswith(message)


def test_debug_is_recommended_for_errors_of_other_packages_only(fail, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["lr", "--batch", "0"]) == 2
    own = capsys.readouterr().err
    assert own == "metamorph lr: error: --batch 0 must be at least 1\n"
    fail(ValueError("raised in a test"))
    assert cli.main(["lr"]) == 2
    assert capsys.readouterr().err.endswith("error: raised in a test (metamorph --debug lr … shows where)\n")


def test_ctrl_c_is_one_line_and_a_bug_keeps_its_traceback(fail, capsys: pytest.CaptureFixture[str]) -> None:
    fail(KeyboardInterrupt())
    assert cli.main(["lr"]) == 130
    assert capsys.readouterr().err == "metamorph lr: interrupted\n"
    with pytest.raises(KeyboardInterrupt):
        cli.main(["--debug", "lr"])
    fail(RuntimeError("a bug"))
    with pytest.raises(RuntimeError):
        cli.main(["lr"])


def test_errors_and_log_lines_do_not_command_the_terminal(
    fail, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path in untrusted data may hold escapes that clear the screen or forge a line."""
    fail(ValueError("no file \x1b[2J\x9b31m\r\u202e in\n\tthe folder 👨‍👩‍👧"))
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    assert cli.main(["lr"]) == 2
    assert "no file \\x1b[2J\\x9b31m\\r\\u202e in\n\tthe folder 👨‍👩‍👧" in capsys.readouterr().err
    logging.getLogger("metamorph").warning("skipping %s", "\x1b]0;OWNED\x07")
    assert "skipping \\x1b]0;OWNED\\x07\n" in capsys.readouterr().err


def test_an_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trian"]) == 2
    assert capsys.readouterr().err.startswith(
        "metamorph: unknown command 'trian': did you mean 'train'? (all commands: metamorph --help)\n"
    )
    assert cli.main(["zzz"]) == 2
    assert capsys.readouterr().err.startswith("metamorph: unknown command 'zzz' (all commands: metamorph --help)\n")


@pytest.mark.parametrize(("entry_point", "warns"), [("metamorph.main:__main__", True), ("metamorph.cli:main", False)])
def test_the_other_project_called_metamorph_is_named(
    entry_point: str, warns: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An installation of ours from before the distribution was renamed is no other project."""
    folder = tmp_path / "metamorph-1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: metamorph\nVersion: 1\nSummary: Rewords text.\n")
    (folder / "entry_points.txt").write_text(f"[console_scripts]\nmetamorph={entry_point}\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert cli.main(["lr", "--batch", "768"]) == 0
    assert ("(Rewords text.) is installed" in caplog.text) == warns


def test_recipes_are_listed_and_printed_by_name(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["recipes"]) == 0
    listed = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert list(listed) == list(shipped_recipes())
    for name, purpose in listed.items():
        assert re.fullmatch(r"[A-Z].{20,100}\.", purpose.strip()), name
        assert cli.main(["recipes", name]) == 0
        assert capsys.readouterr().out == find_recipe(name).read_text(encoding="utf-8")
    assert cli.main(["recipes", "recipes/lama3.1-8b-stage1.yaml"]) == 2
    assert "did you mean llama3.1-8b-stage1" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    Path("tiny-cpu-stage1").write_text("seed: 7\n")  # a file of that name wins
    assert read_recipe("tiny-cpu-stage1") == {"seed": 7}
    assert read_recipe("tiny-cpu-stage2")["vision_head_type"] == "mlp"
    with pytest.raises(FileNotFoundError, match=r"--config zzz is neither .* one of llama3.1-8b-24gb-stage1, "):
        read_recipe("zzz")


@pytest.mark.parametrize("command", [["train"], ["train-visualizer"], ["data", "cache-features"]], ids="-".join)
def test_a_misspelt_recipe_is_found_before_torch_is_imported(command: list[str]) -> None:
    words = [*command, "--config", "zzz"]
    code = f"import sys; from metamorph import cli; print(cli.main({words}), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout == "2 False\n"
    assert "--config zzz is neither a file nor the name of a recipe" in done.stderr
