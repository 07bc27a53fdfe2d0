"""Lets one run at a time use an output folder: a lock names the run, and the next one takes it over if that is gone.

filelock is no replacement: `flock` is unreliable on network file systems, and nothing else notices a dead run on
another machine.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

import torch.distributed as dist

from metamorph.runs.checkpoint_files import CheckpointError, on_first_process


logger = logging.getLogger(__name__)

LOCK_FILE = "_run.json"
"""In the output folder while a run uses it. Uploads to the Hub skip names that begin with `_`."""
HEARTBEAT_SECONDS = 15.0
"""Seconds between two heartbeats, each of which updates the modification time of the file."""
STALE_AFTER_SECONDS = 180.0
"""Seconds without a heartbeat after which a run on another machine is considered gone. Some libraries block all
threads while they write a checkpoint of many gigabytes."""
POLL_SECONDS = 1.0
"""Seconds between two checks for a heartbeat."""

Lock = dict[str, str | None]
"""Content of the file."""

_held: dict[Path, Lock] = {}
"""The locks of this process, by file."""


@contextmanager
def only_run_in(output_dir: str | os.PathLike[str], flag: str = "--output_dir") -> Iterator[None]:
    """Keep other runs out of the output folder, which is created if missing. For all processes; the first locks.

    The lock of a run that is gone is taken over. A run is gone if its process no longer exists (visible from the same
    machine and container), if it was an earlier start of the same Slurm job, or if its last heartbeat is older than
    `STALE_AFTER_SECONDS`, which this waits for. If another run uses the folder or it cannot be written to, all
    processes raise a `CheckpointError`, which calls it `flag`.
    """
    folder = Path(output_dir)
    is_new = not folder.exists()
    lock = on_first_process(lambda: _acquire(folder / LOCK_FILE, flag))
    if dist.is_available() and dist.is_initialized() and dist.get_rank() != 0:
        yield
        return
    _held[(folder / LOCK_FILE).resolve()] = lock
    stop = threading.Event()
    heartbeat = threading.Thread(target=_heartbeat, args=(folder / LOCK_FILE, lock, stop, flag), daemon=True)
    heartbeat.start()
    try:
        yield
    finally:
        stop.set()
        heartbeat.join()
        del _held[(folder / LOCK_FILE).resolve()]
        if _read(folder / LOCK_FILE) == lock:
            (folder / LOCK_FILE).unlink(missing_ok=True)
        if is_new and folder.is_dir() and not any(folder.iterdir()):  # the run failed before it wrote anything
            folder.rmdir()


def check_lock(output_dir: str | os.PathLike[str]) -> None:
    """Raise a `CheckpointError` if another run has taken over the lock of this one. For the process that holds it."""
    path = Path(output_dir, LOCK_FILE)
    held, found = _held.get(path.resolve()), _read(path)
    if held is not None and found is not None and found != held:
        raise CheckpointError(
            f"another run has taken over --output_dir {output_dir} because this one seemed to be gone: "
            f"{_describe(found)}. This run stops and writes nothing"
        )


def _acquire(path: Path, flag: str) -> Lock:
    lock: Lock = {
        "id": uuid.uuid4().hex,
        "host": socket.gethostname(),
        "process": str(os.getpid()),
        "started": _start_time(os.getpid()),
        "machine": _machine(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "slurm_restart": os.environ.get("SLURM_RESTART_COUNT", "0"),
        "since": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with path.open("x", encoding="utf-8") as file:
                json.dump(lock, file)
            return lock
        except FileExistsError:
            previous = _read(path)
        is_gone = not _is_held(path, flag)
        if not path.exists():  # it has ended meanwhile
            return _acquire(path, flag)
        if is_gone and _take_over(path, previous, lock, flag):
            logger.warning("the run that used %s %s is gone: %s", flag, path.parent, _describe(previous))
            return lock
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise CheckpointError(
            f"{flag} {path.parent} cannot be written to ({reason}): give a folder that this run may write to"
        ) from error
    raise CheckpointError(
        f"{flag} {path.parent} is used by another run: {_describe(_read(path))}. Wait for it to end or stop it, "
        f"or give this run its own {flag}. If you are sure that it is gone, delete {path}"
    )


def _is_held(path: Path, flag: str) -> bool:
    """Whether the run that holds the lock still exists; may wait for a heartbeat."""
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.stem) as probe:
            now = os.stat(probe.name).st_mtime  # by the clock of the file system, like that of the lock
        last, began, waits = path.stat().st_mtime, time.monotonic(), False
        while True:
            answer = _owner_is_alive(_read(path))
            if answer is not None:
                return answer
            if path.stat().st_mtime != last:
                return True
            rest = STALE_AFTER_SECONDS - max(now - last, 0) - (time.monotonic() - began)
            if rest <= 0:
                return False
            if not waits:
                waits = True
                logger.warning(
                    "%s %s may be used by another run: %s. Waiting up to %d seconds for a heartbeat",
                    flag,
                    path.parent,
                    _describe(_read(path)),
                    rest,
                )
            time.sleep(POLL_SECONDS)
    except FileNotFoundError:  # it has just ended
        return False


def _owner_is_alive(lock: Lock | None) -> bool | None:
    """Whether a run exists; None if this process cannot tell."""
    if lock is None:
        return None
    job, restart = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_RESTART_COUNT", "0")
    if job is not None and lock["slurm_job"] == job and lock["slurm_restart"] != restart:
        return False  # Slurm ends all processes of a job before it restarts the job
    if lock["machine"] is None or lock["machine"] != _machine():
        return None
    assert lock["process"] is not None
    return _start_time(int(lock["process"])) == lock["started"]  # else a later process has the same id


def _machine() -> str | None:
    """Identifies this boot of the machine and its container, within which process ids can be compared."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return None


def _start_time(process: int) -> str | None:
    """When a process started, in ticks since the boot of the machine; None if it is gone."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    state, *fields = stat.rpartition(")")[2].split()  # the name in parentheses may hold anything
    return None if state in "ZX" else fields[18]  # a zombie is gone


def _describe(lock: Lock | None) -> str:
    if lock is None:
        return "its lock cannot be read"
    job = "" if lock["slurm_job"] is None else f", Slurm job {lock['slurm_job']}"
    return f"host {lock['host']}, process {lock['process']}{job}, since {lock['since']}"


def _read(path: Path) -> Lock | None:
    """The lock in a file; None if there is none, or it is damaged."""
    try:
        lock = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    texts, optional = ("id", "host", "process", "since"), ("started", "machine", "slurm_job", "slurm_restart")
    if not isinstance(lock, dict) or not all(isinstance(lock.get(name), str) for name in texts):
        return None
    has_optional = all(name in lock and isinstance(lock[name], str | None) for name in optional)
    return lock if has_optional and lock["id"].isalnum() and lock["process"].isdecimal() else None


def _take_over(path: Path, previous: Lock | None, lock: Lock, flag: str) -> bool:
    """Replace the lock of a run that is gone, unless another run does so at the same time."""
    # Only the run that creates this file may replace that lock, so that one run wins, and none that is late.
    claim = path.with_name(f"{path.stem}-after-{'unreadable' if previous is None else previous['id']}.json")
    try:
        with claim.open("x", encoding="utf-8") as file:
            json.dump(lock, file)
    except FileExistsError:
        if not _is_held(claim, flag):
            claim.unlink(missing_ok=True)  # of a run that stopped in the middle of this; the next attempt succeeds
        return False
    try:
        if _read(path) != previous:
            return False
        claim.replace(path)
        return True
    finally:
        claim.unlink(missing_ok=True)


def _heartbeat(path: Path, lock: Lock, stop: threading.Event, flag: str) -> None:
    while not stop.wait(HEARTBEAT_SECONDS):
        found = _read(path)
        if found is not None and found != lock:
            logger.error(
                "another run has taken over %s %s because this one seemed to be gone: %s. Stop one of them",
                flag,
                path.parent,
                _describe(found),
            )
            return
        try:
            os.utime(path)
        except FileNotFoundError:
            logger.warning("%s has been deleted: it no longer keeps other runs out of the folder", path)
            return
        except OSError:  # a file server may come back
            continue
