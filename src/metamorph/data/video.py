"""Videos through PyAV: when each frame is shown, and the frames shown at given times."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class VideoInfo:
    """What is known of a video without decoding it."""

    times: tuple[float, ...]
    """When each frame begins to be shown, in seconds from the first one; ascending, at least one, the first is 0."""
    duration: float
    """Length in seconds, the time for which the last frame is shown included."""
    width: int
    """Width in pixels, as stored."""
    height: int
    """Height in pixels, as stored."""

    @property
    def num_frames(self) -> int:
        """Number of frames."""
        return len(self.times)

    @property
    def fps(self) -> float:
        """Mean number of frames in a second; 0 if the duration is not known."""
        return self.num_frames / self.duration if self.duration > 0 else 0.0
