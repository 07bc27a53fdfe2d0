"""Preemption: a signal asks for a stop, all processes agree on the step after which they save, and scripts are told."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from collections.abc import Iterable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

from metamorph.runs.ranks import is_first_process


logger = logging.getLogger(__name__)

PREEMPTED = 75
"""Exit status of a run that has saved and wants to be started again: EX_TEMPFAIL of sysexits.h. torchrun turns the
status of its workers into 1, therefore scripts look for `MARKER_FILE`."""
MARKER_FILE = "preempted.json"
"""File in the output folder of such a run; the next run removes it when it starts."""
SIGNALS = tuple(getattr(signal, name) for name in ("SIGUSR1", "SIGTERM") if hasattr(signal, name))
"""What asks for a stop. Clusters send SIGUSR1 where told to (`sbatch --signal`), and SIGTERM before they kill."""
SAME_KEY_PRESS = 0.3
"""Seconds within which a second SIGINT is the first one again: launchers pass on what a terminal sends to all."""
LEAVING = "\nCtrl-C: saving a checkpoint, then stopping. Press Ctrl-C again to leave at once.\n"


class Preempted(SystemExit):
    """The run has saved and stops, because a signal asked for it. Uncaught, it ends the process with `PREEMPTED`.

    Args:
        step: Optimizer steps done.
    """

    def __init__(self, step: int) -> None:
        super().__init__(PREEMPTED)
        self.step = step


class Interrupted(KeyboardInterrupt):
    """The run has saved and stops, because Ctrl-C asked for it. No marker is left: nothing should start it again.

    Args:
        step: Optimizer steps done.
        message: Where the checkpoint is, and how to resume from it.
    """

    def __init__(self, step: int, message: str) -> None:
        super().__init__(message)
        self.step = step


class Preemption:
    """Catches the signals while it is entered, and lets all processes of a run agree to stop.

    The handler only takes a note, so a step is never torn. Only the main thread may handle signals: elsewhere nothing
    is caught, and a line in the log says so. Ctrl-C is caught from `catch_interrupt` on, and a second one is not.

    Args:
        timeout: How long `agreed` waits for the other processes.
    """

    def __init__(self, timeout: timedelta = timedelta(minutes=30)) -> None:
        self.timeout = timeout
        self.signal: signal.Signals | None = None
        """The first signal that this process has got."""
        self.is_interrupt = False
        """Whether Ctrl-C alone is what the processes have agreed to stop for."""
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
            # None: set by something other than Python, which cannot be restored from here.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def catch_interrupt(self) -> None:
        """From here on there is something to save: the first Ctrl-C asks for a stop as the signals do."""
        is_entered = bool(self._previous)  # in the main thread
        # A run in the background of a script ignores Ctrl-C, which is meant for the script.
        if is_entered and signal.getsignal(signal.SIGINT) not in (signal.SIG_IGN, self._note_interrupt):
            self._previous[signal.SIGINT] = signal.signal(signal.SIGINT, self._note_interrupt)

    def _note_interrupt(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a data worker that has been forked, but has not come to `ignore_signals` yet
        now = time.monotonic()
        if self._interrupted_at is None:
            self._interrupted_at = now
            if is_first_process():
                os.write(2, LEAVING.encode())
            self._note(number, frame)
        elif now - self._interrupted_at > SAME_KEY_PRESS:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a third one ends the process whatever it waits for
            raise KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> None:
        # No logging here: it may interrupt another log line, whose stream does not allow that.
        if self.signal is None:
            self.signal = signal.Signals(number)

    def agreed(self) -> bool:
        """Whether any process has got a signal; all get the same answer and must ask at the same point of the run.

        Costs one reduction of a byte between the processors, over gloo where there is one: no accelerator waits.
        """
        wanted = 0 if self.signal is None else 1 if self.signal == signal.SIGINT else 2
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            self.is_interrupt = wanted == 1
            return wanted > 0
        if self._group is None:
            # Of its own: collectives of other threads or of the accelerators must not come in between.
            self._group = dist.new_group(backend="gloo" if dist.is_gloo_available() else None, timeout=self.timeout)
        device = "cpu" if dist.is_gloo_available() else torch.accelerator.current_accelerator()
        most = torch.tensor([wanted], dtype=torch.uint8, device=device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self._group)
        self.is_interrupt = most.item() == 1
        return bool(most.item())


def write_marker(output_dir: str | os.PathLike[str], step: int, checkpoint: str | None, reason: str | None) -> Path:
    """Tell scripts that the run is to be started again. For one process, once all have saved.

    Args:
        output_dir: Folder of the run; created if missing.
        step: Optimizer steps done.
        checkpoint: Name of the folder, in `output_dir`, that the next run goes on from; None: it starts anew.
        reason: Name of the signal; None if another process got it.

    Returns:
        Path of the file: JSON with `step`, `checkpoint`, `signal` and `time`.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    time = datetime.now(timezone.utc).isoformat(timespec="seconds")
    values = {"step": step, "checkpoint": checkpoint, "signal": reason, "time": time}
    path, partial = folder / MARKER_FILE, folder / f".{MARKER_FILE}.partial"
    partial.write_text(json.dumps(values) + "\n", encoding="utf-8")
    partial.replace(path)  # at once: a script never reads half a file
    return path


def clear_marker(output_dir: str | os.PathLike[str]) -> None:
    """Remove the marker of an earlier run, so that a run that fails is not started again. For one process.

    Args:
        output_dir: Folder of the run; it need not exist.
    """
    (Path(output_dir) / MARKER_FILE).unlink(missing_ok=True)


def ignore_signals(*_: Any, numbers: Iterable[signal.Signals] = (*SIGNALS, signal.SIGINT)) -> None:
    """Let this process live on when its whole group gets the signals: for workers, which their main process ends.

    Usable as the `worker_init_fn` of a data loader. PyTorch's own handler would end a worker at SIGTERM, and the main
    process with it, in the middle of a step.
    """
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)
