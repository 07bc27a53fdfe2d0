"""Time and memory of each stage of the quickstart."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


logger = logging.getLogger(__name__)

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class StageClock:
    """Seconds and peak memory of each stage, in the order in which they ran."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        """Wall-clock seconds by stage."""
        self.cpu_seconds: dict[str, float] = {}
        """Processor seconds by stage, over all threads: unlike wall-clock time it hardly depends on other programs."""
        self.peak_rss_mb: dict[str, float] = {}
        """Peak resident memory of the process within each stage, in MB; where the system cannot reset the peak (not
        Linux), the peak up to the end of the stage."""
        self._began = time.perf_counter()

    @contextmanager
    def stage(self, name: str, title: str) -> Iterator[None]:
        """Measure what happens within, and log one line before and after it.

        Args:
            name: Key of the stage.
            title: What it does, in words.
        """
        logger.info("%s …", title)
        _reset_peak_rss()
        began, cpu_began = time.perf_counter(), time.process_time()
        yield
        self.seconds[name] = round(time.perf_counter() - began, 1)
        self.cpu_seconds[name] = round(time.process_time() - cpu_began, 1)
        self.peak_rss_mb[name] = peak_rss_mb()
        logger.info("%s: %.0f s, peak memory %.0f MB", title, self.seconds[name], self.peak_rss_mb[name])

    @property
    def largest_peak_rss_mb(self) -> float:
        """The largest peak of all stages."""
        return max(self.peak_rss_mb.values(), default=0.0)

    @property
    def total(self) -> float:
        """Seconds since the clock was made."""
        return round(time.perf_counter() - self._began, 1)


def peak_rss_mb() -> float:
    """Peak resident memory of this process since the last reset, in MB; 0 where the system does not tell (Windows)."""
    if _STATUS.exists():
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return round(int(line.split()[1]) / 2**10, 1)
    try:
        import resource
    except ModuleNotFoundError:
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)


def _reset_peak_rss() -> None:
    """Let the peak start again from the present memory (Linux; see `man 5 proc`, clear_refs)."""
    if _CLEAR_REFS.exists() and os.access(_CLEAR_REFS, os.W_OK):
        _CLEAR_REFS.write_text("5")
