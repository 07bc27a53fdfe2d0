"""Preemption: a signal asks for a stop, all processes agree on the step after which they save, and scripts are told."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist


logger = logging.getLogger(__name__)

PREEMPTED = 75
"""Exit status of a run that has saved and wants to be started again: EX_TEMPFAIL of sysexits.h. torchrun turns the
status of its workers into 1, therefore scripts look for `MARKER_FILE`."""
MARKER_FILE = "preempted.json"
"""File in the output folder of such a run; the next run removes it when it starts."""
SIGNALS = tuple(getattr(signal, name) for name in ("SIGUSR1", "SIGTERM") if hasattr(signal, name))
"""What asks for a stop. Clusters send SIGUSR1 where told to (`sbatch --signal`), and SIGTERM before they kill."""


class Preempted(SystemExit):
    """The run has saved and stops, because a signal asked for it. Uncaught, it ends the process with `PREEMPTED`.

    Args:
        step: Optimizer steps done.
    """

    def __init__(self, step: int) -> None:
        super().__init__(PREEMPTED)
        self.step = step


class Preemption:
    """Catches the signals while it is entered, and lets all processes of a run agree to stop.

    The handler only takes a note, so a step is never torn. Only the main thread may handle signals: elsewhere nothing
    is caught, and a line in the log says so.

    Args:
        timeout: How long `agreed` waits for the other processes.
    """

    def __init__(self, timeout: timedelta = timedelta(minutes=30)) -> None:
        self.timeout = timeout
        self.signal: signal.Signals | None = None
        """The first signal that this process has got."""
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

    def _note(self, number: int, frame: FrameType | None) -> None:
        # No logging here: it may interrupt another log line, whose stream does not allow that.
        if self.signal is None:
            self.signal = signal.Signals(number)

    def agreed(self) -> bool:
        """Whether any process has got a signal; all get the same answer and must ask at the same point of the run.

        Costs one reduction of a byte between the processors, over gloo where there is one: no accelerator waits.
        """
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return self.signal is not None
        if self._group is None:
            # Of its own: collectives of other threads or of the accelerators must not come in between.
            self._group = dist.new_group(backend="gloo" if dist.is_gloo_available() else None, timeout=self.timeout)
        device = "cpu" if dist.is_gloo_available() else torch.accelerator.current_accelerator()
        wanted = torch.tensor([self.signal is not None], dtype=torch.uint8, device=device)
        dist.all_reduce(wanted, op=dist.ReduceOp.MAX, group=self._group)
        return bool(wanted.item())


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


def ignore_signals(*_: Any) -> None:
    """Let this process live on when its whole group gets the signals: for workers, which their main process ends.

    Usable as the `worker_init_fn` of a data loader. PyTorch's own handler would end a worker at SIGTERM, and the main
    process with it, in the middle of a step.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
