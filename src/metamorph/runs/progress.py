"""Progress of anything that takes long: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import logging
import sys
import threading
import time
import weakref
from collections.abc import Iterable
from typing import Any, ClassVar

from tqdm import tqdm

from metamorph.runs.ranks import is_first_process


logger = logging.getLogger(__name__)


class Progress(tqdm):
    """tqdm's bar on a terminal. Elsewhere (nohup, tee, Docker, Slurm) a log line at least every 30 seconds:

        stage 2 · step 120/700 · loss 1.90 · 3 min left

    Lines come by the clock, also while a single step takes minutes. What ends before the first is due logs nothing.
    The logger is this module's, at level INFO.
    Only the main process of a run shows anything.

    Args:
        iterable: What to go through; without one, call `update`.
        desc: What is done, in front of bar and line.
        total: Number of items; by default the length of `iterable`.
        unit: What an item is, in the singular.
        bar: Whether to draw a bar; by default if stderr is a terminal.
        **kwargs: As for tqdm, for example `initial`.
    """

    first_seconds: ClassVar[float] = 5.0
    """Time until the first line."""
    interval_seconds: ClassVar[float] = 25.0
    """Time between lines."""

    def __init__(
        self,
        iterable: Iterable | None = None,
        desc: str | None = None,
        total: float | None = None,
        unit: str = "it",
        *,
        bar: bool | None = None,
        **kwargs: Any,
    ) -> None:
        is_main = is_first_process()
        self.has_bar = is_main and (sys.stderr.isatty() if bar is None else bar)
        if not self.has_bar:
            # tqdm only counts: twice a second it puts `n` right, and `display` draws nothing.
            kwargs |= {"mininterval": 0.5, "miniters": 1, "delay": 0, "leave": False}
        super().__init__(iterable, desc, total, unit=unit, disable=not is_main, **kwargs)
        self._has_logged = False
        self._closed = threading.Event()
        self._log_lock = threading.Lock()
        self._due = time.monotonic() + self.first_seconds
        if is_main and not self.has_bar:
            threading.Thread(target=_log_by_the_clock, args=(weakref.ref(self), self._closed), daemon=True).start()

    def say(self, line: str) -> None:
        """Show a line about the work: above the bar, or in the log, where it counts as the next line that is due."""
        if self.disable:
            return
        if self.has_bar:
            self.write(line, file=self.fp)
            return
        logger.info("%s", line)
        self._due = time.monotonic() + self.interval_seconds

    def seconds_left(self) -> float | None:
        """Estimate from the mean speed so far; None before the first item, without a total, or if nothing is shown."""
        if self.disable or self.total is None or self.n <= self.initial:  # a disabled tqdm knows nothing of itself
            return None
        done = self.n - self.initial
        return max(self.total - self.n, 0) * self.format_dict["elapsed"] / done

    def line(self, *, is_over: bool = False) -> str:
        """The state of the work in one line, with the time that is left, or that it took."""
        if self.total is None:
            count = f"{self.n:,} {self.unit}s"
        elif self.unit_scale:
            count = f"{self.n / max(self.total, 1):.0%}"
        else:
            count = f"{self.unit} {self.n:,}/{self.total:,}"
        values = str(self.postfix or "").replace("=", " ").replace(", ", " · ")
        left = self.seconds_left()
        if is_over:
            ended = "took" if self.total is None or self.n >= self.total else "stopped after"
            time_left = f"{ended} {duration(self.format_dict['elapsed'])}"
        else:
            time_left = "" if left is None else f"{duration(left)} left"
        return " · ".join(filter(None, [self.desc.removesuffix(": "), count, values, time_left]))

    def display(self, msg: str | None = None, pos: int | None = None) -> bool | None:  # type: ignore[override]
        """Draw the bar, if there is one."""
        return super().display(msg, pos) if self.has_bar else None

    def close(self) -> None:
        """Remove the bar, or log how it ended if lines were logged."""
        if not self.disable:
            with self._log_lock:  # no line of the clock comes after the last one
                self._closed.set()
                if not self.has_bar and (self._has_logged or time.monotonic() >= self._due):
                    logger.info("%s", self.line(is_over=True))
        super().close()

    def _log_if_due(self) -> float:
        """Log the state if it is time, and return the seconds until it will be."""
        with self._log_lock:
            if time.monotonic() >= self._due and not self._closed.is_set():
                self._has_logged = True
                self.say(self.line())
        return max(self._due - time.monotonic(), 0.0)


def log_line(progress: Progress, epoch: float, loss: float, learning_rate: float, per_second: float, unit: str) -> str:
    """Six aligned fields of a log entry of training: step, epoch, loss, learning rate, `unit` per second, time left."""
    left = progress.seconds_left()
    fields = (
        f"step {progress.n:>{len(str(progress.total))}}/{progress.total}",
        f"epoch {epoch:6.2f}",
        f"loss {loss:8.4f}",
        f"lr {learning_rate:.2e}",
        f"{per_second:>8,.{0 if per_second >= 100 else 1}f} {unit}/s",
        f"{'?' if left is None else duration(left)} left",
    )
    return " · ".join(fields)


def duration(seconds: float) -> str:
    """In words: `45 s`, `12 min`, `3 h 20 min`, `2 d 5 h`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    hours, days = minutes // 60, minutes // 1440
    if days >= 2:
        return f"{days} d {hours % 24} h"
    return f"{hours} h {minutes % 60} min" if hours else f"{minutes} min"


def _log_by_the_clock(progress: weakref.ref[Progress], closed: threading.Event) -> None:
    """Body of the thread. It does not keep the progress alive: an exception may leave it without `close`."""
    wait = 0.0
    while not closed.wait(wait):
        alive = progress()
        if alive is None:
            return
        wait = alive._log_if_due()
        del alive
