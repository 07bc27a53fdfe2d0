"""Figures of a benchmark with bootstrap confidence intervals, for all samples and for each category."""

from __future__ import annotations

from collections.abc import Sequence
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
    resampled = _resampled(metric, samples, [metric.unit(sample) for sample in samples], scores)
    return {
        name: {"value": value, **_interval(resampled[name]), "n": _count(scores, name)}
        for name, value in metric.summarise(samples, scores).items()
    }


def differences(
    metric: Metric, samples: Sequence[Sample], units: Sequence[str], a: Sequence[Scores], b: Sequence[Scores]
) -> dict[str, dict[str, Any]]:
    """Each figure of two runs on the same samples: `{"a", "b", "difference", "low", "high", "n", "n_a", "n_b"}`, b - a.

    Both are resampled with the same units, so what makes a sample hard for both does not widen the interval. Only
    scores that both runs have count, `n` of the `n_a` and `n_b` of each: who draws only what is easy gains nothing.
    """
    shared = [first.keys() & second.keys() for first, second in zip(a, b, strict=True)]
    paired_a, paired_b = (
        [{name: value for name, value in each.items() if name in names} for each, names in zip(of, shared, strict=True)]
        for of in (a, b)
    )
    before, after = metric.summarise(samples, paired_a), metric.summarise(samples, paired_b)
    first, second = (_resampled(metric, samples, units, paired) for paired in (paired_a, paired_b))
    return {
        name: {
            "a": before[name],
            "b": after[name],
            "difference": after[name] - before[name],
            **_interval(second[name] - first[name]),
            "n": _count(paired_a, name),
            "n_a": _count(a, name),
            "n_b": _count(b, name),
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


def _resampled(
    metric: Metric, samples: Sequence[Sample], units: Sequence[str], scores: Sequence[Scores]
) -> dict[str, np.ndarray]:
    """Each figure of `RESAMPLES` resamples, NaN where a resample lacks it; the same resamples in every call."""
    counts = _resample(units)
    if type(metric).summarise is Metric.summarise:  # one product instead of a thousand loops
        weights = counts.astype(float)  # each product would convert them
        names = dict.fromkeys(name for each in scores for name in each)
        has = {name: np.array([name in each for each in scores], dtype=float) for name in names}
        sums = {name: weights @ np.array([each.get(name, 0.0) for each in scores]) for name in names}
        with np.errstate(invalid="ignore"):
            return metric.from_means({name: sums[name] / (weights @ has[name]) for name in names})
    found = []
    for row in counts:
        chosen = np.repeat(np.arange(len(samples)), row).tolist()
        found.append(metric.summarise([samples[index] for index in chosen], [scores[index] for index in chosen]))
    names = dict.fromkeys(name for each in found for name in each)
    return {name: np.array([each.get(name, np.nan) for each in found]) for name in names}


def _resample(units: Sequence[str]) -> np.ndarray:
    """Draw units with replacement: how often each resample has each sample, int64 `[RESAMPLES, samples]`."""
    numbers: dict[str, int] = {}
    number_of = [numbers.setdefault(unit, len(numbers)) for unit in units]
    rng = np.random.default_rng(0)
    draws = (rng.integers(len(numbers), size=len(numbers)) for _ in range(RESAMPLES))
    return np.stack([np.bincount(chosen, minlength=len(numbers)) for chosen in draws])[:, number_of]


def _interval(values: np.ndarray) -> dict[str, float]:
    """The percentile interval of the resampled values."""
    low, high = np.nanquantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return {"low": float(low), "high": float(high)}


def _count(scores: Sequence[Scores], name: str) -> int:
    """The samples that have the score of that name; all of them for other figures."""
    return sum(name in each for each in scores) or len(scores)
