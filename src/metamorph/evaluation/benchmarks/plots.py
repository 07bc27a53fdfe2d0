"""Plots of results: figures with their intervals, for all samples and for each category. Needs Matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


ALL, CATEGORY, BETTER, WORSE, UNDECIDED, INK = "#8c959f", "#80ccff", "#1a7f37", "#cf222e", "#57606a", "#24292f"
_ROW_INCHES, _MARGIN_INCHES = 0.28, 1.1
_LONGEST = 40
"""Characters of a category's name."""

Row = tuple[str, Mapping[str, Any], str]
"""Label, figure and colour."""


def save_result(result: Mapping[str, Any], file: Path) -> None:
    """Plot the headline of all samples and of each category as bars with 95 % intervals."""
    name = result["headline"]
    rows = _rows(result["summary"], result["categories"], name)
    figure, axes = _figure(rows, result["benchmark"], name)
    values = [each["value"] for _, each, _ in rows]
    places = range(len(rows))
    errors = [[max(each["value"] - each.get("low", each["value"]), 0) for _, each, _ in rows]]
    errors += [[max(each.get("high", each["value"]) - each["value"], 0) for _, each, _ in rows]]
    axes.barh(places, values, xerr=errors, color=[colour for *_, colour in rows], height=0.62, ecolor=INK, capsize=2)
    ends = [each.get("high", each["value"]) for _, each, _ in rows]
    for place, value, end in zip(places, values, ends, strict=True):
        axes.annotate(f"{value:.3f}", (max(end, 0), place), (4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.margins(x=0.12)
    if min(values) >= 0:
        axes.set_xlim(left=0)
    figure.savefig(file)


def save_comparison(comparison: Mapping[str, Any], file: Path) -> None:
    """Plot the difference of the headline, b - a, with 95 % intervals; colours show those without 0."""
    name = comparison["headline"]
    rows = _rows(comparison["figures"], comparison["categories"], name)
    figure, axes = _figure(rows, comparison["benchmark"], f"difference of {name}, b - a")
    for place, (_, each, _) in enumerate(rows):
        low, high = each.get("low", each["difference"]), each.get("high", each["difference"])
        is_better = (each["difference"] > 0) != comparison["lower_is_better"]
        colour = UNDECIDED if low <= 0 <= high else BETTER if is_better else WORSE
        axes.plot([low, high], [place, place], color=colour, linewidth=2)
        axes.plot(each["difference"], place, "o", color=colour, markersize=5)
    axes.axvline(0, color=INK, linewidth=0.8)
    figure.savefig(file)


def _rows(figures: Mapping[str, Any], categories: Mapping[str, Any], name: str) -> list[Row]:
    if name not in figures:
        raise ValueError(f"there is no plot, because no sample has {name}; all other files are complete")
    rows: list[Row] = [("all", figures[name], ALL)]
    for kind, found in categories.items():
        rows += [(f"{kind}: {each}"[:_LONGEST], of[name], CATEGORY) for each, of in found.items() if name in of]
    return rows


def _figure(rows: Sequence[Row], title: str, label: str) -> tuple[Figure, Any]:
    """A figure with a line for each row, the first one at the top."""
    figure = Figure(figsize=(7, _ROW_INCHES * len(rows) + _MARGIN_INCHES), dpi=110, layout="constrained")
    axes = figure.subplots()
    labels = [f"{name}  (n = {each['n']:,})" for name, each, _ in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=8, parse_math=False)  # names may have a $
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_title(title, fontsize=10, loc="left", parse_math=False)
    axes.set_xlabel(label, fontsize=9)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
