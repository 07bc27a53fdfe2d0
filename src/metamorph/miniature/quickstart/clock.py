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
    """Seconds and peak memory by stage, in the order in which the stages ran."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        """Wall-clock seconds."""
        self.cpu_seconds: dict[str, float] = {}
        """CPU seconds over all threads, which depend less than wall-clock time on other programs."""
        self.peak_rss_mb: dict[str, float] = {}
        """Peak resident memory of the process in MB: within the stage on Linux, up to its end elsewhere."""
        self._began = time.perf_counter()

    @contextmanager
    def stage(self, name: str, title: str) -> Iterator[None]:
        """Measure the stage `name`, and log `title` before and after it."""
        logger.info("%s …", title)
        if os.access(_CLEAR_REFS, os.W_OK):
            _CLEAR_REFS.write_text("5")  # resets the peak (Linux; see `man 5 proc`, clear_refs)
        began, cpu_began = time.perf_counter(), time.process_time()
        yield
        self.seconds[name] = round(time.perf_counter() - began, 1)
        self.cpu_seconds[name] = round(time.process_time() - cpu_began, 1)
        self.peak_rss_mb[name] = _peak_rss_mb()
        logger.info("%s: %.0f s, peak memory %.0f MB", title, self.seconds[name], self.peak_rss_mb[name])

    @property
    def total(self) -> float:
        """Seconds since the clock was created."""
        return round(time.perf_counter() - self._began, 1)


def _peak_rss_mb() -> float:
    """Peak resident memory of this process since the last reset, in MB; 0 if unknown (Windows)."""
    if _STATUS.exists():
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return round(int(line.split()[1]) / 2**10, 1)
    try:
        import resource
    except ModuleNotFoundError:
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)
