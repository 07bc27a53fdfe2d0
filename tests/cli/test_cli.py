"""The `metamorph` command around its subcommands: exit statuses, messages, and what is not printed."""

import logging
import sys
from collections.abc import Sequence
from types import ModuleType

import pytest

from metamorph import cli


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
        monkeypatch.setitem(sys.modules, cli.COMMANDS["lr"].module, subcommand(error))

    return replace


def test_a_missing_package_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path
) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # what the import system keeps for a module that is not there
    (tmp_path / "data.jsonl").write_text("")
    words = ["train", "--model_name_or_path", "owner/llm", "--data_path", str(tmp_path / "data.jsonl")]
    flags = ["--tune_mm_mlp_adapter", "True", "--output_dir", str(tmp_path), "--bf16", "False", "--sharding", "zero2"]
    assert cli.main([*words, *flags]) == 2
    message = "metamorph train: error: --sharding zero2 needs DeepSpeed: pip install 'metamorph[deepspeed]'"
    assert capsys.readouterr().err.startswith(message)


def test_debug_is_recommended_for_errors_of_other_packages_only(fail, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["lr", "--batch", "0"]) == 2
    own = capsys.readouterr().err
    assert own == "metamorph lr: error: --batch 0 must be at least 1\n"
    fail(ValueError("raised in a test"))
    assert cli.main(["lr"]) == 2
    assert capsys.readouterr().err.endswith("error: raised in a test (metamorph --debug lr … shows where)\n")


def test_ctrl_c_is_one_line(fail, capsys: pytest.CaptureFixture[str]) -> None:
    fail(KeyboardInterrupt())
    assert cli.main(["lr"]) == 130
    assert capsys.readouterr().err == "metamorph lr: interrupted\n"
    with pytest.raises(KeyboardInterrupt):
        cli.main(["--debug", "lr"])


def test_errors_and_log_lines_do_not_command_the_terminal(
    fail, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path of a stranger's data may hold escapes that clear the screen or forge a line."""
    fail(ValueError("no file \x1b[2J\x9b31m\r\u202e in\n\tthe folder 👨‍👩‍👧"))
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    assert cli.main(["lr"]) == 2
    assert "no file \\x1b[2J\\x9b31m\\r\\u202e in\n\tthe folder 👨‍👩‍👧" in capsys.readouterr().err
    logging.getLogger("metamorph").warning("skipping %s", "\x1b]0;OWNED\x07")
    assert "skipping \\x1b]0;OWNED\\x07\n" in capsys.readouterr().err


def test_an_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trian"]) == 2
    assert capsys.readouterr().err.startswith("metamorph: unknown command 'trian': did you mean 'train'?\n")
    assert cli.main(["zzz"]) == 2
    assert capsys.readouterr().err.startswith("metamorph: unknown command 'zzz'\n")


def test_faults_of_ours_keep_their_traceback(fail) -> None:
    fail(RuntimeError("a fault"))
    with pytest.raises(RuntimeError):
        cli.main(["lr"])


def test_deepspeed_speaks_only_of_what_matters(caplog: pytest.LogCaptureFixture) -> None:
    cli.main(["lr", "--batch", "768"])
    logger = logging.getLogger("DeepSpeed")
    logger.addHandler(caplog.handler)
    try:
        logger.warning("Setting accelerator to CPU. If you have GPU or other accelerator, we were unable to detect it.")
        logger.warning("something else")
    finally:
        logger.removeHandler(caplog.handler)
    assert [record.getMessage() for record in caplog.records if record.name == "DeepSpeed"][-1:] == ["something else"]
    assert "Setting accelerator" not in caplog.text
