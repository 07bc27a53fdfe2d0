"""Progress of long work: a bar on a terminal, regular lines in a log."""

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

    Lines come by the clock, even while a single step takes minutes; work that ends before the first is due logs none.
    Only the main process shows anything. Arguments are tqdm's, and `bar`: whether to draw a bar (default: if stderr is
    a terminal).
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
            # tqdm only counts: it updates `n` twice a second, and `display` draws nothing.
            kwargs |= {"mininterval": 0.5, "miniters": 1, "delay": 0, "leave": False}
        super().__init__(iterable, desc, total, unit=unit, disable=not is_main, **kwargs)
        self._has_logged = False
        self._closed = threading.Event()
        self._log_lock = threading.Lock()
        self._due = time.monotonic() + self.first_seconds
        if is_main and not self.has_bar:
            threading.Thread(target=_log_by_the_clock, args=(weakref.ref(self), self._closed), daemon=True).start()

    def say(self, line: str) -> None:
        """Show a line above the bar, or log it instead of the next line that is due."""
        if self.disable:
            return
        if self.has_bar:
            self.write(line, file=self.fp)
            return
        logger.info("%s", line)
        self._due = time.monotonic() + self.interval_seconds

    def seconds_left(self) -> float | None:
        """Estimate from the mean speed; None before the first item, without a total, or if nothing is shown."""
        if self.disable or self.total is None or self.n <= self.initial:  # a disabled tqdm has no times
            return None
        done = self.n - self.initial
        return max(self.total - self.n, 0) * self.format_dict["elapsed"] / done

    def line(self, *, is_over: bool = False) -> str:
        """The state of the work in one line, with the time left or taken."""
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
            with self._log_lock:  # the thread logs no line after the last one
                self._closed.set()
                if not self.has_bar and (self._has_logged or time.monotonic() >= self._due):
                    logger.info("%s", self.line(is_over=True))
        super().close()

    def _log_if_due(self) -> float:
        """Log the state if it is due, and return the seconds until it is due again."""
        with self._log_lock:
            if time.monotonic() >= self._due and not self._closed.is_set():
                self._has_logged = True
                self.say(self.line())
        return max(self._due - time.monotonic(), 0.0)


def log_line(progress: Progress, epoch: float, loss: float, learning_rate: float, per_second: float, unit: str) -> str:
    """Six aligned fields of a training log entry: step, epoch, loss, learning rate, `unit` per second, time left."""
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
    """A duration such as `45 s`, `12 min`, `3 h 20 min` or `2 d 5 h`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    hours, days = minutes // 60, minutes // 1440
    if days >= 2:
        return f"{days} d {hours % 24} h"
    return f"{hours} h {minutes % 60} min" if hours else f"{minutes} min"


def _log_by_the_clock(progress: weakref.ref[Progress], closed: threading.Event) -> None:
    """Body of the thread. The weak reference lets a `Progress` that an exception left without `close` be collected."""
    wait = 0.0
    while not closed.wait(wait):
        alive = progress()
        if alive is None:
            return
        wait = alive._log_if_due()
        del alive
