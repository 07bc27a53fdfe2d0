"""What a metric is: a dataclass whose fields are the options of `metric:` in a spec."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch

from metamorph.evaluation.samples import Answer, Sample
from metamorph.inference.session import Session
from metamorph.runs.progress import Progress


T = TypeVar("T")
Scores = Mapping[str, float]
"""Figures of one sample by name; a sample may lack those that do not apply to it."""


@dataclass(frozen=True)
class Tools:
    """What a metric may use."""

    device: torch.device
    open_session: Callable[[], Session]
    """Loads the evaluated model, or returns the loaded one."""
    progress: Progress
    """Advanced by one for each judged sample."""
    folder: Path
    """The output folder, where a metric may keep files, such as the answers of a judge."""
    _made: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    def once(self, name: str, make: Callable[[], T]) -> T:
        """What `make()` returned when this name was first asked for; `score` and `of_set` share it."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]


@dataclass(frozen=True)
class Metric(ABC):
    """Judges the answers of a benchmark."""

    name: ClassVar[str]
    """In specs."""
    headline: ClassVar[str]
    """The figure of `summarise` that is quoted, for example `accuracy`. Higher is better unless `lower_is_better`."""
    lower_is_better: ClassVar[bool] = False
    needs_images: ClassVar[bool] = False
    """Whether answers are drawn, which takes a visualizer."""
    needs_visual_tokens: ClassVar[bool] = False

    def unit(self, sample: Sample) -> str:
        """Samples of the same unit are chosen and resampled together; by default each is one.

        Questions about the same image, or the two halves of a pair, are not independent, so intervals need to know of
        them. A figure of pairs belongs in the scores of their samples, where resampling finds it.
        """
        return sample.id

    def check(self, samples: Sequence[Sample]) -> None:
        """Raise a `ValueError` before the model is loaded if samples, weights or an endpoint do not fit."""
        return

    @abstractmethod
    def score(self, samples: Sequence[Sample], answers: Sequence[Answer], tools: Tools) -> list[dict[str, float]]:
        """The figures of each sample; an answer with an error, or without the image asked for, counts as wrong."""

    def summarise(self, samples: Sequence[Sample], scores: Sequence[Scores]) -> dict[str, float]:
        """Figures of all these samples: by default the mean of each score over the samples that have it.

        It is also called with the samples of a category, and with resampled ones for confidence intervals.
        """
        names = dict.fromkeys(name for each in scores for name in each)
        columns = {name: [each[name] for each in scores if name in each] for name in names}
        return self.from_means({name: sum(column) / len(column) for name, column in columns.items()})

    def from_means(self, means: dict[str, Any]) -> dict[str, Any]:
        """Figures from the mean of each score; by default the means.

        For figures such as F1. They are resampled at once: a mean is a number, or an array with one for each resample.
        """
        return means

    def of_set(self, samples: Sequence[Sample], answers: Sequence[Answer], tools: Tools) -> dict[str, float]:
        """Figures that only exist for all answers together, such as FID; they get no confidence interval."""
        return {}
