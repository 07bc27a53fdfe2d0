"""What a benchmark asks, and what a model answered."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Sample:
    """One question of a benchmark, or one prompt for images."""

    id: str
    """Unique in the benchmark; the same in each load, so that two results can be compared."""
    fields: Mapping[str, str]
    """What the spec's prompt may name in braces, for example `question` and `options`."""
    reference: Any = None
    """What the metric compares the answer with, for JSON."""
    images: tuple[str, ...] = ()
    """Files, or data URLs; videos as `videos`."""
    videos: tuple[str, ...] = ()
    """Files."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Further files or data URLs that the metric needs, by name, for example the true `image` of a prompt."""
    categories: Mapping[str, str] = field(default_factory=dict)
    """Kind of category → category, for example `{"skill": "counting"}`. Results are also reported for each."""
    history: tuple[Mapping[str, str], ...] = ()
    """Turns before the prompt, `{"role", "content"}`, with `<image>` for each of the first `images`."""


@dataclass(frozen=True)
class Answer:
    """A model's answer to a sample, read from the files of results."""

    text: str = ""
    images: tuple[Path, ...] = ()
    """All drawings, in order."""
    visual_tokens: tuple[Path, ...] = ()
    """One .safetensors file for each image of the answer; only for metrics that need them."""
    error: str | None = None
    """Why there is no answer; metrics count it as wrong."""
