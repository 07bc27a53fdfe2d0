"""Figures of a benchmark with bootstrap confidence intervals, for all samples and for each category."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from metamorph.evaluation.metrics.base import Metric, Scores
from metamorph.evaluation.samples import Sample


RESAMPLES = 1000
CONFIDENCE = 0.95


def figures(metric: Metric, samples: Sequence[Sample], scores: Sequence[Scores]) -> dict[str, dict[str, Any]]:
    """Each figure of these samples: `{"value", "low", "high", "n"}`, with the ends of its 95 % interval.

    `n` is the number of samples that count.
    """
    found = metric.summarise(samples, scores)
    resampled = [_summarise(metric, samples, scores, chosen) for chosen in resamples(metric, samples)]
    return {
        name: {
            "value": value,
            **interval([each[name] for each in resampled if name in each]),
            "n": _count(scores, name),
        }
        for name, value in found.items()
    }


def differences(
    metric: Metric, samples: Sequence[Sample], a: Sequence[Scores], b: Sequence[Scores]
) -> dict[str, dict[str, Any]]:
    """Each figure of two runs on the same samples: `{"a", "b", "difference", "low", "high", "n"}`, b - a.

    Both are resampled with the same samples, so what makes a sample hard for both does not widen the interval.
    """
    before, after = metric.summarise(samples, a), metric.summarise(samples, b)
    pairs = [
        (_summarise(metric, samples, a, chosen), _summarise(metric, samples, b, chosen))
        for chosen in resamples(metric, samples)
    ]
    return {
        name: {
            "a": before[name],
            "b": after[name],
            "difference": after[name] - before[name],
            **interval([second[name] - first[name] for first, second in pairs if name in first and name in second]),
            "n": _count(a, name),
        }
        for name in before
        if name in after
    }


def by_category(samples: Sequence[Sample]) -> dict[str, dict[str, list[int]]]:
    """Numbers of the samples of each category, by kind of category."""
    found: dict[str, dict[str, list[int]]] = {}
    for number, sample in enumerate(samples):
        for kind, category in sample.categories.items():
            found.setdefault(kind, {}).setdefault(category, []).append(number)
    return found


def resamples(metric: Metric, samples: Sequence[Sample]) -> list[np.ndarray]:
    """Numbers of samples, drawn with replacement by units; the same ones in every call."""
    units: dict[str, list[int]] = {}
    for number, sample in enumerate(samples):
        units.setdefault(metric.unit(sample), []).append(number)
    groups = [np.array(numbers) for numbers in units.values()]
    rng = np.random.default_rng(0)
    return [
        np.concatenate([groups[index] for index in rng.integers(len(groups), size=len(groups))])
        for _ in range(RESAMPLES)
    ]


def interval(values: Sequence[float]) -> dict[str, float]:
    """The percentile interval of the resampled values."""
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return {"low": float(low), "high": float(high)}


def _summarise(
    metric: Metric, samples: Sequence[Sample], scores: Sequence[Scores], chosen: np.ndarray
) -> Mapping[str, float]:
    return metric.summarise([samples[index] for index in chosen], [scores[index] for index in chosen])


def _count(scores: Sequence[Scores], name: str) -> int:
    """The samples that have the score of that name; all of them for other figures."""
    return sum(name in each for each in scores) or len(scores)
