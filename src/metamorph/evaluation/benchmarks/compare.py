"""Two results of a benchmark: figures with intervals of their difference, changed answers, and what else differs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from metamorph.evaluation.benchmarks.intervals import by_category, differences
from metamorph.evaluation.metrics import METRICS
from metamorph.evaluation.metrics.base import Metric, Scores
from metamorph.evaluation.options import build
from metamorph.evaluation.samples import Sample


_FIGURES = ("answers", "summary", "categories", "errors", "headline", "lower_is_better", "date")
"""What is compared as figures, or always differs."""


def compare(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """Compare two results, as `read_result` reads them, on the samples that both have.

    Returns:
        `samples`: their number; `figures` and, by kind and category, `categories`: see `differences`; `changes`: the
        samples with a better and a worse score; `differs`: other values of the results, `[a, b]` by their names.

    Raises:
        ValueError: If they do not share a sample, a sample or the metric differs, or this version lacks the metric.
    """
    metric = _metric(a, b)
    first, second = ({answer["id"]: answer for answer in result["answers"]} for result in (a, b))
    ids = [name for name in first if name in second]
    if not ids:
        raise ValueError(f"the results of {a['benchmark']} and {b['benchmark']} have no sample in common")
    for name in ids:
        if first[name]["sample_sha256"] != second[name]["sample_sha256"]:
            raise ValueError(f"the results are of different data: sample {name} is not the same in both")
    samples, units = [_sample(first[name]) for name in ids], [first[name]["unit"] for name in ids]
    before, after = ([of[name]["scores"] for name in ids] for of in (first, second))

    def differences_of(numbers: Sequence[int]) -> dict[str, dict[str, Any]]:
        chosen = ([of[number] for number in numbers] for of in (before, after))
        return differences(
            metric, [samples[number] for number in numbers], [units[number] for number in numbers], *chosen
        )

    return {
        "benchmark": a["benchmark"],
        "samples": len(ids),
        "only_in_a": len(first) - len(ids),
        "only_in_b": len(second) - len(ids),
        "headline": metric.headline,
        "lower_is_better": metric.lower_is_better,
        "figures": differences(metric, samples, units, before, after) | _of_set(a, b),
        "categories": {
            kind: {category: differences_of(numbers) for category, numbers in categories.items()}
            for kind, categories in by_category(samples).items()
        },
        "changes": _changes(metric, ids, before, after),
        "differs": _differing(a, b),
    }


def table(comparison: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows of the figures: those of all samples, then the headline of each category."""
    headline = comparison["headline"]
    rows = [_row(name, figure) for name, figure in comparison["figures"].items()]
    for kind, categories in comparison["categories"].items():
        rows += [
            _row(f"{headline}, {kind} {category}", found[headline])
            for category, found in categories.items()
            if headline in found
        ]
    return ("figure", "a", "b", "b - a", "95 % interval", "n"), rows


def _metric(a: Mapping[str, Any], b: Mapping[str, Any]) -> Metric:
    first, second = a["spec"]["content"]["metric"], b["spec"]["content"]["metric"]
    if first != second:
        raise ValueError(f"the results have different metrics, {first} and {second}: judge both with the same one")
    return build(METRICS, first, f"the metric of {a['benchmark']}")


def _sample(answer: Mapping[str, Any]) -> Sample:
    return Sample(answer["id"], answer["fields"], answer["reference"], categories=answer["categories"])


def _of_set(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Figures that only exist for all answers together, if these are of the same samples."""
    if a["data"]["sha256"] != b["data"]["sha256"]:
        return {}
    before, after = ({name: each for name, each in of["summary"].items() if "low" not in each} for of in (a, b))
    return {
        name: {
            "a": before[name]["value"],
            "b": after[name]["value"],
            "difference": after[name]["value"] - before[name]["value"],
            "n": before[name]["n"],
        }
        for name in before
        if name in after
    }


def _changes(metric: Metric, ids: Sequence[str], a: Sequence[Scores], b: Sequence[Scores]) -> dict[str, Any]:
    """Samples whose score changed: the headline's, or the first one that there is if it is a figure of all samples."""
    names = [name for each in a for name in each]
    name = metric.headline if metric.headline in names or not names else names[0]
    changes: dict[str, Any] = {"score": name, "better": [], "worse": []}
    for sample, before, after in zip(ids, a, b, strict=True):
        if name in before and name in after and before[name] != after[name]:
            is_better = (after[name] > before[name]) != metric.lower_is_better
            changes["better" if is_better else "worse"].append({"id": sample, "a": before[name], "b": after[name]})
    return changes


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, list[Any]]:
    first, second = (dict(_flat({k: v for k, v in each.items() if k not in _FIGURES})) for each in (a, b))
    return {
        name: [first.get(name), second.get(name)] for name in {**first, **second} if first.get(name) != second.get(name)
    }


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested values by names such as `model.sha256`."""
    found: list[tuple[str, Any]] = []
    for name, value in values.items():
        found += _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(f"{prefix}{name}", value)]
    return found


def _row(name: str, figure: Mapping[str, Any]) -> tuple[str, ...]:
    ends = f"{figure['low']:+.4f} to {figure['high']:+.4f}" if "low" in figure else "-"
    count = f"{figure['n']:,}"
    if "n_a" in figure and not figure["n_a"] == figure["n"] == figure["n_b"]:
        count += f" (a {figure['n_a']:,}, b {figure['n_b']:,})"
    return name, f"{figure['a']:.4f}", f"{figure['b']:.4f}", f"{figure['difference']:+.4f}", ends, count
