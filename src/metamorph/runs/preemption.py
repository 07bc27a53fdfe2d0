"""Preemption: a signal asks for a stop, all processes agree on the step to save after, and a marker tells scripts."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

from metamorph.runs.ranks import is_first_process


logger = logging.getLogger(__name__)

PREEMPTED = 75
"""Exit status of a run that has saved and should be restarted: EX_TEMPFAIL of sysexits.h. torchrun replaces the status
of its workers by 1 (or 0: see `Preempted`), so scripts look for `MARKER_FILE`."""
MARKER_FILE = "preempted.json"
"""File in the output folder of such a run; the next run removes it at its start."""
SIGNALS = tuple(getattr(signal, name) for name in ("SIGUSR1", "SIGTERM") if hasattr(signal, name))
"""Signals that ask for a stop: SIGUSR1 if requested (`sbatch --signal`), SIGTERM before a cluster kills a job."""
SAME_KEY_PRESS = 0.3
"""Seconds within which a second SIGINT is the same key press: launchers forward what the terminal sends to all."""
LEAVING = "\nCtrl-C: saving a checkpoint, then stopping. Press Ctrl-C again to quit at once.\n"


class Preempted(SystemExit):
    """The run has saved after optimizer step `step` and stops; uncaught, with the exit status `PREEMPTED`.

    Under `torchrun --max-restarts`, which restarts what fails, the status is 0.
    """

    def __init__(self, step: int) -> None:
        restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))  # torchrun tells its workers
        super().__init__(0 if restarts else PREEMPTED)
        self.step = step


class Interrupted(KeyboardInterrupt):
    """The run has saved after optimizer step `step` and stops because of Ctrl-C; without a marker, so not restarted.

    The message says where the checkpoint is and how to resume from it.
    """

    def __init__(self, step: int, message: str) -> None:
        super().__init__(message)
        self.step = step


class Preemption:
    """Context manager that catches signals and lets all processes of a run agree to stop.

    The handler only records the signal, so no step is interrupted. Outside of the main thread signals cannot be
    handled, and a warning is logged. Ctrl-C is caught from `catch_interrupt` on, but not a second one. `agreed` waits
    for the other processes until `timeout`.
    """

    def __init__(self, timeout: timedelta = timedelta(minutes=30)) -> None:
        self.timeout = timeout
        self.signal: signal.Signals | None = None
        """The first signal that this process received."""
        self.is_interrupt = False
        """Whether the processes have agreed to stop because of Ctrl-C alone."""
        self._interrupted_at: float | None = None
        self._process = os.getpid()
        self._group: dist.ProcessGroup | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Preemption:
        if threading.current_thread() is not threading.main_thread():
            logger.warning("not in the main thread: a signal will end this run without saving")
            return self
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            # None: the handler was not installed from Python and cannot be restored.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def catch_interrupt(self) -> None:
        """From now on there is something to save, so the first Ctrl-C asks for a stop like the signals."""
        is_entered = bool(self._previous)  # in the main thread
        # A run in the background of a script ignores Ctrl-C, which is meant for the script.
        if is_entered and signal.getsignal(signal.SIGINT) not in (signal.SIG_IGN, self._note_interrupt):
            self._previous[signal.SIGINT] = signal.signal(signal.SIGINT, self._note_interrupt)

    def _note_interrupt(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a forked data worker that has not called `ignore_signals` yet
        now = time.monotonic()
        if self._interrupted_at is None:
            self._interrupted_at = now
            if is_first_process():
                os.write(2, LEAVING.encode())
            self._note(number, frame)
        elif now - self._interrupted_at > SAME_KEY_PRESS:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a third one ends the process whatever it is waiting for
            raise KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> None:
        # No logging here: a signal may interrupt another log call, and log streams are not reentrant.
        if self.signal is None:
            self.signal = signal.Signals(number)

    def agreed(self) -> bool:
        """Whether any process has received a signal. A collective: all ask at the same point, and get the same answer.

        Costs an all-reduce of one byte over gloo if available, so that no accelerator waits.
        """
        wanted = 0 if self.signal is None else 1 if self.signal == signal.SIGINT else 2
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            self.is_interrupt = wanted == 1
            return wanted > 0
        if self._group is None:
            # A separate group, so that collectives of other threads or the accelerators do not interfere.
            self._group = dist.new_group(backend="gloo" if dist.is_gloo_available() else None, timeout=self.timeout)
        device = "cpu" if dist.is_gloo_available() else torch.accelerator.current_accelerator()
        most = torch.tensor([wanted], dtype=torch.uint8, device=device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self._group)
        self.is_interrupt = most.item() == 1
        return bool(most.item())


def write_marker(output_dir: str | os.PathLike[str], step: int, checkpoint: str | None, reason: str | None) -> Path:
    """Write the marker that tells scripts to restart the run, and return its path. Call it once all have saved.

    `checkpoint` is the one to resume from, if any; `reason` the signal, if this process received it.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    time = datetime.now(timezone.utc).isoformat(timespec="seconds")
    values = {"step": step, "checkpoint": checkpoint, "signal": reason, "time": time}
    path, partial = folder / MARKER_FILE, folder / f".{MARKER_FILE}.partial"
    partial.write_text(json.dumps(values) + "\n", encoding="utf-8")
    partial.replace(path)  # atomic: a script never reads half a file
    return path


def clear_marker(output_dir: str | os.PathLike[str]) -> None:
    """Remove the marker of an earlier run, if any, so that a run that fails is not restarted. For one process."""
    (Path(output_dir) / MARKER_FILE).unlink(missing_ok=True)


@contextmanager
def stops_quietly() -> Iterator[None]:
    """Ignore further signals once a run is preempted: torchrun sends SIGTERM to the others when one is gone.

    Trackers can then finish their uploads.
    """
    try:
        yield
    except Preempted:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        raise


def ignore_signals(*_: Any) -> None:
    """Ignore signals sent to the process group: for workers, which their main process ends.

    Usable as the `worker_init_fn` of a data loader. PyTorch's own handler would end a worker at SIGTERM and, in the
    middle of a step, the main process with it.
    """
    for number in (*SIGNALS, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
