"""Signals are noted, the marker is written and removed, and everything is as before afterwards."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from metamorph.runs import preemption as preemption_module
from metamorph.runs.preemption import (
    MARKER_FILE,
    PREEMPTED,
    SIGNALS,
    Preempted,
    Preemption,
    clear_marker,
    write_marker,
)
from metamorph.training.arguments import MetaMorphTrainingArguments


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_nothing_else_happens(number: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    with Preemption() as preemption:
        assert not preemption.agreed()
        os.kill(os.getpid(), number)
        assert preemption.agreed()
        assert preemption.signal == number
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.signal == number  # the first one counts
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_ctrl_c_is_noted_once_there_is_something_to_save_and_a_second_one_leaves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(preemption_module, "SAME_KEY_PRESS", 60.0)
    before = signal.getsignal(signal.SIGINT)
    with Preemption() as preemption:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert not preemption.agreed()
        preemption.catch_interrupt()
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # the same key press, passed on by a launcher
        assert preemption.agreed()
        assert preemption.is_interrupt
        preemption._interrupted_at -= 120.0
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


def test_ctrl_c_stays_ignored_in_the_background_and_is_caught_once(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Preemption() as preemption:
            preemption.catch_interrupt()
            os.kill(os.getpid(), signal.SIGINT)
            assert not preemption.agreed()
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    with Preemption() as preemption:
        preemption.catch_interrupt()
        preemption.catch_interrupt()
    assert signal.getsignal(signal.SIGINT) == before


def test_a_data_worker_that_has_just_been_forked_says_nothing_of_ctrl_c(capfd: pytest.CaptureFixture[str]) -> None:
    with Preemption() as preemption:
        preemption.catch_interrupt()
        worker = multiprocessing.get_context("fork").Process(target=signal.raise_signal, args=(signal.SIGINT,))
        worker.start()
        worker.join()
        assert worker.exitcode == 0
        assert not preemption.agreed()
    assert "Ctrl-C" not in capfd.readouterr().err


def test_handlers_are_restored_after_an_error() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyError), Preemption():
        raise KeyError
    assert signal.getsignal(signal.SIGTERM) == before


def test_other_threads_run_without(caplog: pytest.LogCaptureFixture) -> None:
    answers = []

    def run() -> None:
        with Preemption() as preemption:
            answers.append(preemption.agreed())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert answers == [False]
    assert "not in the main thread" in caplog.text


def test_marker(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    clear_marker(folder)  # nothing there yet
    path = write_marker(folder, 12, "checkpoint-12", "SIGUSR1")
    assert path == folder / MARKER_FILE
    values = json.loads(path.read_text())
    assert values.pop("time").endswith("+00:00")
    assert values == {"step": 12, "checkpoint": "checkpoint-12", "signal": "SIGUSR1"}
    assert [file.name for file in folder.iterdir()] == [MARKER_FILE]
    clear_marker(folder)
    assert not list(folder.iterdir())


def test_r28_uncaught_it_ends_the_process_with_its_status() -> None:
    code = "from metamorph.runs.preemption import Preempted; raise Preempted(3)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == PREEMPTED == 75
    assert done.stderr == ""
    assert not isinstance(Preempted(3), Exception)  # `except Exception` does not swallow it


def test_savers_of_transformers_that_do_not_agree_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--enable_jit_checkpoint True is not supported: it lets every process decide"):
        MetaMorphTrainingArguments(output_dir=str(tmp_path), enable_jit_checkpoint=True)
