"""The lock of an output folder: whose it is, and when it is taken over."""

import json
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from metamorph.runs import lock as run_lock
from metamorph.runs.checkpoint_files import CheckpointError
from metamorph.runs.lock import LOCK_FILE, check_lock, only_run_in


HOLD = """
import sys, time
from metamorph.runs.lock import only_run_in

with only_run_in(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signs of life follow each other quickly, and their lack is noticed soon."""
    monkeypatch.setattr(run_lock, "HEARTBEAT_SECONDS", 0.05)
    monkeypatch.setattr(run_lock, "STALE_AFTER_SECONDS", 1.0)
    monkeypatch.setattr(run_lock, "POLL_SECONDS", 0.05)
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


def change(folder: Path, **values: str | None) -> dict[str, str | None]:
    """Write other values into a lock that is held, as if another run held it."""
    lock = json.loads((folder / LOCK_FILE).read_text()) | values
    (folder / LOCK_FILE).write_text(json.dumps(lock))
    return lock


@pytest.fixture
def left(tmp_path: Path) -> Path:
    """A folder with the lock of a run of this process that has not ended properly."""
    with only_run_in(tmp_path):
        text = (tmp_path / LOCK_FILE).read_text()
    (tmp_path / LOCK_FILE).write_text(text)
    return tmp_path


def test_the_lock_is_there_while_the_run_is(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "out"
    with only_run_in(folder):
        lock = json.loads((folder / LOCK_FILE).read_text())
        assert lock["process"] == str(os.getpid())
        (folder / "result").touch()
    assert [path.name for path in folder.iterdir()] == ["result"]


def test_a_run_that_fails_at_once_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    for name in ("new", "old"):
        with pytest.raises(ZeroDivisionError), only_run_in(tmp_path / name):
            _ = 1 / 0
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert not any((tmp_path / "old").iterdir())


def test_another_run_is_refused_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    with only_run_in(tmp_path):
        message = rf"--output_dir {tmp_path} is used .* host .*, process {os.getpid()}, Slurm job 4711, since"
        with pytest.raises(CheckpointError, match=message), only_run_in(tmp_path):
            pass
        assert (tmp_path / LOCK_FILE).exists()


def test_a_killed_run_is_taken_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError, match=f"process {other.pid}"), only_run_in(tmp_path):
            pass
    finally:
        other.kill()
    # Not waited for: a killed process whose parent does not look after it still has its number.
    while Path(f"/proc/{other.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    with only_run_in(tmp_path):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["process"] == str(os.getpid())
    assert f"is gone: host {os.uname().nodename}, process {other.pid}" in caplog.text
    other.wait()


@pytest.mark.usefixtures("soon")
def test_a_later_process_with_the_same_number_is_not_the_run(left: Path) -> None:
    with pytest.raises(CheckpointError, match="used by another run"), only_run_in(left):
        pass
    change(left, started="12")
    with only_run_in(left):
        pass


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("machine", ["another", None])  # another host or container; not Linux
def test_a_silent_run_elsewhere_is_taken_over(
    left: Path, machine: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    change(left, machine=machine, host="elsewhere")
    with only_run_in(left):
        assert json.loads((left / LOCK_FILE).read_text())["host"] != "elsewhere"
    assert "may be used by another run: host elsewhere" in caplog.text
    assert "heartbeat" in caplog.text


@pytest.mark.usefixtures("soon")
def test_a_run_that_has_long_been_silent_is_not_waited_for(left: Path, caplog: pytest.LogCaptureFixture) -> None:
    change(left, machine="another")
    os.utime(left / LOCK_FILE, (time.time() - 3600,) * 2)
    with only_run_in(left):
        pass
    assert "Waiting" not in caplog.text


@pytest.mark.usefixtures("soon")
def test_a_heartbeat_from_elsewhere_is_respected(tmp_path: Path) -> None:
    with only_run_in(tmp_path):
        lock = json.loads((tmp_path / LOCK_FILE).read_text())
        stop = threading.Event()
        other = change(tmp_path, machine="another", host="elsewhere", id="other")
        beats = threading.Thread(target=run_lock._heartbeat, args=(tmp_path / LOCK_FILE, other, stop, "--output_dir"))
        beats.start()
        try:
            with pytest.raises(CheckpointError, match="host elsewhere"), only_run_in(tmp_path):
                pass
        finally:
            stop.set()
            beats.join()
        assert json.loads((tmp_path / LOCK_FILE).read_text()) == other != lock
    assert (tmp_path / LOCK_FILE).exists()  # it is not ours to remove


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize(("job", "restart", "waits"), [("7", "1", False), ("7", "0", True), ("8", "1", True)])
def test_an_earlier_start_of_the_same_slurm_job_is_gone(
    left: Path, job: str, restart: str, waits: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    change(left, machine="another", slurm_job="7", slurm_restart="0")
    monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.setenv("SLURM_RESTART_COUNT", restart)
    with only_run_in(left):
        pass
    assert ("Waiting" in caplog.text) == waits


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("damage", ["", "[]", "{}", {"process": "abc"}, {"process": ["1"]}, {"id": "../x"}])
def test_a_damaged_lock_is_taken_over_once_it_is_old(damage: str | dict[str, Any], left: Path) -> None:
    if isinstance(damage, str):
        (left / LOCK_FILE).write_text(damage)
    else:
        change(left, **damage)
    with only_run_in(left):
        pass
    assert not (left / LOCK_FILE).exists()


@pytest.mark.usefixtures("soon")
def test_only_one_of_several_runs_takes_a_lock_over(left: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them is late: between its look at the lock that is left and its take-over, another has begun and works."""
    change(left, started="12")
    lives, late = run_lock._is_held, []

    def look(path: Path, flag: str) -> bool:
        answer = lives(path, flag)
        if not late:
            late.append(only_run_in(left))
            late[0].__enter__()
        return answer

    monkeypatch.setattr(run_lock, "_is_held", look)
    with pytest.raises(CheckpointError, match=f"used by another run: host .* process {os.getpid()}"), only_run_in(left):
        pass
    check_lock(left)
    late[0].__exit__(None, None, None)
    assert not any(left.iterdir())


@pytest.mark.usefixtures("soon")
def test_a_run_that_stopped_amid_a_take_over_is_in_the_way_once(left: Path) -> None:
    dead = change(left, started="12")
    (left / f"_run-after-{dead['id']}.json").write_text(json.dumps(dead))
    with pytest.raises(CheckpointError, match="used by another run"), only_run_in(left):
        pass
    with only_run_in(left):
        pass


@pytest.mark.usefixtures("soon")
def test_the_run_that_lost_its_lock_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = threading.Event()
    monkeypatch.setattr(run_lock.logger, "error", lambda *args: (logging.getLogger().error(*args), said.set()))
    with only_run_in(tmp_path):
        change(tmp_path, id="other", host="elsewhere")
        assert said.wait(30)
        with pytest.raises(CheckpointError, match=r"host elsewhere.* This run stops and writes nothing"):
            check_lock(tmp_path)
    assert "another run has taken over" in caplog.text
    assert "host elsewhere" in caplog.text


@pytest.mark.usefixtures("soon")
def test_a_lock_that_is_deleted_meanwhile(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with only_run_in(tmp_path):
        check_lock(tmp_path)
        (tmp_path / LOCK_FILE).unlink()
        check_lock(tmp_path)
        while "has been deleted" not in caplog.text:
            time.sleep(0.01)


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "out"
    message = rf"--output_dir {folder} cannot be written to \(Not a directory\)"
    with pytest.raises(CheckpointError, match=message), only_run_in(folder):
        pass


FAIL = """
import sys
import torch.distributed as dist
from metamorph.runs.checkpoint_files import on_first_process

dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=int(sys.argv[2]), world_size=2)
try:
    on_first_process(lambda: {}["no such key"])
except (KeyError, RuntimeError) as error:
    print(repr(error))
assert on_first_process(lambda: 7) == 7
dist.destroy_process_group()  # its threads would abort a process that ends before them
"""


@pytest.mark.distributed
def test_any_error_of_the_first_process_ends_all(tmp_path: Path) -> None:
    """None waits for an answer that does not come."""
    command = [sys.executable, "-c", FAIL, str(tmp_path / "store")]
    processes = [subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True) for rank in (0, 1)]
    first, second = (process.communicate(timeout=300)[0] for process in processes)
    assert first.startswith("KeyError('no such key')")
    assert second.startswith("RuntimeError(\"the first process has failed: KeyError('no such key')\")")
    assert [process.returncode for process in processes] == [0, 0]
