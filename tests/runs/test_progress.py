"""Progress: what is seen on a terminal, in a log, and by whom."""

import logging
import re
import sys
import time

import pytest

from metamorph.runs.progress import Progress, duration, log_line


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """Lines are due from the start."""
    monkeypatch.setattr(Progress, "first_seconds", 0.0)
    caplog.set_level(logging.INFO, "metamorph")
    return caplog


def test_a_line_says_what_how_far_and_how_long(at_once: pytest.LogCaptureFixture, capfd) -> None:
    with Progress(desc="stage 2", total=700, unit="step", initial=100) as progress:
        assert progress.line() == "stage 2 · step 100/700"
        now = progress.start_t + 60
        progress._time = lambda: now
        progress.update(20)
        progress.set_postfix({"loss": "1.90", "cosine": "0.5"})
        assert progress.line() == "stage 2 · step 120/700 · loss 1.90 · cosine 0.5 · 29 min left"
    assert at_once.messages[-1] == "stage 2 · step 120/700 · loss 1.90 · cosine 0.5 · stopped after 1 min"
    assert list(Progress(range(3), "records", unit="record")) == [0, 1, 2]
    assert re.fullmatch(r"records · record 3/3 · took \d+ s", at_once.messages[-1])
    with Progress(desc="indexing a.json", total=2000, unit="B", unit_scale=True) as progress:
        progress.update(500)
    assert re.fullmatch(r"indexing a.json · 25% · stopped after \d+ s", at_once.messages[-1])
    with Progress(iter("ab"), "files", unit="file") as progress:
        assert len(list(progress)) == 2
    assert re.fullmatch(r"files · 2 files · took \d+ s", at_once.messages[-1])
    assert capfd.readouterr() == ("", "")


def test_lines_come_by_the_clock_while_one_step_lasts(
    at_once: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Progress, "interval_seconds", 0.01)
    with Progress(desc="drawings", total=2, unit="image"):
        end = time.monotonic() + 60
        while len(at_once.messages) < 3 and time.monotonic() < end:
            time.sleep(0.01)
    assert at_once.messages[:3] == ["drawings · image 0/2"] * 3


def test_what_ends_soon_logs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert Progress.first_seconds + Progress.interval_seconds <= 30
    assert sum(Progress(range(10), "short")) == 45
    assert not caplog.messages


def test_only_the_main_process_shows_anything(
    at_once: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    monkeypatch.setenv("RANK", "1")
    for bar in (True, False):
        with Progress(desc="stage 2", total=2, bar=bar) as progress:
            progress.update(1)
            progress.set_postfix({"loss": "1.90"})
            progress.say(log_line(progress, 0.5, 1.9, 1e-3, 100.0, "tokens"))
    assert not at_once.messages
    assert capfd.readouterr() == ("", "")


def test_a_terminal_has_a_bar_with_time_left(
    at_once: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress(desc="stage 2", total=4, unit="step", mininterval=0) as progress:
        progress.update(2)
        progress.say("step 2/4 · loss 1.0")
    shown = capsys.readouterr().err
    assert re.search(r"stage 2:  50%\|█+ +\| 2/4 \[\d\d:\d\d<\d\d:\d\d", shown)
    assert "step 2/4 · loss 1.0\n" in shown
    assert not at_once.messages


def test_fields_of_log_lines_are_aligned() -> None:
    with Progress(total=1000, unit="step") as progress:
        first = log_line(progress, 0.0, 12.5, 1e-3, 98.76, "tokens")
        progress.start_t -= 100
        progress.update(50)
        second = log_line(progress, 12.25, 1.2345, 2e-5, 12345.6, "tokens")
    assert first == "step    0/1000 · epoch   0.00 · loss  12.5000 · lr 1.00e-03 ·     98.8 tokens/s · ? left"
    assert second == "step   50/1000 · epoch  12.25 · loss   1.2345 · lr 2.00e-05 ·   12,346 tokens/s · 32 min left"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (59.4, "59 s"), (60, "1 min"), (3599, "1 h 0 min"), (12_060, "3 h 21 min"), (190_000, "2 d 4 h")],
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words
