"""PNG files of the report: loss curves, accuracies, and grids of images with their prompts and verdicts."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from metamorph.evaluation.drawings import Drawing
from metamorph.miniature.quickstart.evaluate import VERDICTS


RIGHT, WRONG, INK = "#1a7f37", "#cf222e", "#24292f"
_COLUMNS = 8
_LINE_LENGTH = 24
_CELL_INCHES, _LINE_INCHES, _ROW_GAP_INCHES, _TITLE_INCHES = 1.45, 0.125, 0.12, 0.45
_CURVES = ("#9a6700", "#0969da", "#1a7f37", "#8250df")
_NO_IMAGE = Image.new("RGB", (64, 64), "#f6f8fa")


@dataclass(frozen=True)
class Cell:
    """A cell of a grid."""

    images: tuple[Image.Image | None, ...]
    """Side by side; None if the model should have drawn and did not."""
    text: str
    """Below the images."""
    verdict: str
    """Below the text: an answer or verdict."""
    is_right: bool
    """Decides the colour of the frame and the text."""


def drawing_cell(drawing: Drawing, *, with_inputs: bool = False) -> Cell:
    """A drawing with its prompt and verdict, next to the images of the prompt if `with_inputs`."""
    inputs = drawing.task.prompt.images if with_inputs else ()
    prompt = str(drawing.task.prompt.text).replace("<image>", "").strip()
    return Cell((*inputs, drawing.image), prompt, verdict_text(drawing.verdict), drawing.is_right())


def verdict_text(verdict: dict[str, bool]) -> str:
    """A verdict in words: `right`, `no image`, or for example `wrong: shape, size`."""
    if not verdict:
        return "no image"
    if verdict["all"]:
        return "right"
    wrong = [name for name in VERDICTS[1:] if not verdict[name]]
    return f"wrong: {', '.join(wrong) or 'number of objects'}"


def save_grid(path: Path, title: str, cells: Sequence[Cell]) -> None:
    """Write a grid of cells, all with the same number of images, to a PNG file."""
    width = max((len(cell.images) for cell in cells), default=1)
    columns = max(1, min(_COLUMNS // width, len(cells)))
    rows = max(1, -(-len(cells) // columns))
    texts = [
        "\n".join(
            textwrap.fill(line, _LINE_LENGTH * width) for line in f"{cell.text}\n{cell.verdict}".strip().splitlines()
        )
        for cell in cells
    ]
    text_inches = _LINE_INCHES * max((text.count("\n") + 1 for text in texts), default=0)
    row_inches = _CELL_INCHES + text_inches + _ROW_GAP_INCHES
    height = rows * row_inches + _TITLE_INCHES
    figure = Figure(figsize=(columns * width * _CELL_INCHES, height), dpi=110)
    figure.suptitle(title, color=INK, y=1 - 0.3 * _TITLE_INCHES / height, verticalalignment="center")
    figure.subplots_adjust(
        left=0.01,
        right=0.99,
        top=1 - _TITLE_INCHES / height,
        bottom=(text_inches + _ROW_GAP_INCHES) / height,
        wspace=0.08,
        hspace=(text_inches + _ROW_GAP_INCHES) / _CELL_INCHES,
    )
    for index, cell in enumerate(cells):
        color = RIGHT if cell.is_right else WRONG
        for place, image in enumerate(cell.images):
            axes = figure.add_subplot(rows, columns * width, index * width + place + 1)
            _show(axes, image, color if place == width - 1 else None)
            if place == 0:
                axes.set_xlabel(texts[index], fontsize=7, color=color, loc="left")
    figure.savefig(path)


def save_curves(
    path: Path, stage1: Sequence[dict[str, Any]], stage2: Sequence[dict[str, Any]], visualizer: Sequence[float]
) -> None:
    """Plot the losses in the logs of both stages, and of every step of the visualizer."""
    figure = Figure(figsize=(13, 3.2), dpi=110)
    axes = figure.subplots(1, 4)
    _plot(axes[0], "stage 1: text loss", *_series(stage1, "text_loss"))
    _plot(axes[1], "stage 2: text loss", *_series(stage2, "text_loss"))
    _plot(axes[2], "stage 2: visual loss (1 − cosine)", *_series(stage2, "visual_loss"))
    _plot(axes[3], "visualizer: diffusion loss", *_smoothed(visualizer))
    figure.tight_layout()
    figure.savefig(path)


def save_accuracies(path: Path, per_type: dict[str, float]) -> None:
    """Plot the accuracy of each type of question as bars."""
    figure = Figure(figsize=(6, 0.4 * len(per_type) + 0.8), dpi=110)
    axes = figure.subplots()
    names = list(reversed(per_type))
    bars = axes.barh(names, [per_type[name] for name in names], color="#0969da")
    axes.bar_label(bars, fmt="{:.0%}", padding=3)
    axes.set_xlim(0, 1.12)
    axes.set_title("exact answers by type of question")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)


STUDY_TITLES = {
    "seen": "drawings: colour and shape drawn together in training",
    "held_out": "drawings: never drawn together",
    "vqa": "questions answered",
}


def save_study_curves(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Plot the share of right drawings over drawing records, with standard errors over seeds.

    `rows` are those of `study.summarise_runs`; each condition is a curve.
    """
    figure = Figure(figsize=(10, 3.8), dpi=110)
    drawn = [row for row in rows if row["drawings"] and row["group"] != "vqa"]
    conditions = list(dict.fromkeys(row["condition"] for row in drawn))
    for axes, group in zip(figure.subplots(1, 2, sharey=True), ("seen", "held_out"), strict=True):
        for index, condition in enumerate(conditions):
            points = [row for row in drawn if (row["group"], row["condition"]) == (group, condition)]
            budgets, means, errors = ([row[key] for row in points] for key in ("drawings", "mean", "standard_error"))
            color = _CURVES[index % len(_CURVES)]
            axes.errorbar(budgets, means, yerr=errors, color=color, marker="o", capsize=3, label=condition)
        axes.set_title(STUDY_TITLES[group], fontsize=10)
        axes.set_xscale("log")
        axes.set_xticks(sorted({row["drawings"] for row in drawn}))
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.minorticks_off()
        axes.set_xlabel("drawing records", fontsize=9)
        axes.set_ylim(-0.02, 1.02)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("drawings completely right", fontsize=9)
    figure.axes[0].legend(fontsize=9)
    figure.tight_layout()
    figure.savefig(path)


def save_study_maps(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Plot a heat map over drawing records and questions for each group of `study.summarise_runs`."""
    figure = Figure(figsize=(13, 3.8), dpi=110)
    for axes, (group, title) in zip(figure.subplots(1, 3), STUDY_TITLES.items(), strict=True):
        cells = {(row["questions"], row["drawings"]): row for row in rows if row["group"] == group}
        questions, drawings = (sorted({key[index] for key in cells}) for index in (0, 1))
        means = [[cells[q, d]["mean"] if (q, d) in cells else float("nan") for d in drawings] for q in questions]
        axes.imshow(means, cmap="Blues", vmin=0, vmax=1, origin="lower", aspect="auto")
        for (count, budget), row in cells.items():
            text = f"{row['mean']:.0%}" + (f"\n± {row['standard_error']:.0%}" if row["n"] > 1 else "\none seed")
            color = "white" if row["mean"] > 0.6 else "black"
            place = drawings.index(budget), questions.index(count)
            axes.text(*place, text, ha="center", va="center", fontsize=9, color=color)
        axes.set_xticks(range(len(drawings)), drawings)
        axes.set_yticks(range(len(questions)), questions)
        axes.set_xlabel("drawing records", fontsize=9)
        axes.set_ylabel("images with questions", fontsize=9)
        axes.set_title(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path)


def _smoothed(losses: Sequence[float]) -> tuple[list[int], list[float]]:
    """Steps, and means of the losses over windows of up to 10 steps."""
    window = max(1, min(10, len(losses) // 4))
    chunks = [losses[start : start + window] for start in range(0, len(losses), window)]
    steps = [min((index + 1) * window, len(losses)) for index in range(len(chunks))]
    return steps, [sum(chunk) / len(chunk) for chunk in chunks]


def _series(log: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    lines = [line for line in log if name in line]
    return [line["step"] for line in lines], [line[name] for line in lines]


def _plot(axes: Axes, title: str, steps: Sequence[int], values: Sequence[float]) -> None:
    axes.plot(steps, values, color="#0969da")
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("step", fontsize=8)
    if values and min(values) > 0:
        axes.set_yscale("log")
    axes.grid(alpha=0.3, which="both")
    axes.tick_params(labelsize=7)


def _show(axes: Axes, image: Image.Image | None, frame: str | None) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.patch.set_alpha(0)  # the text of the previous cell may extend below this one
    axes.imshow(_NO_IMAGE if image is None else image, interpolation="nearest")
    for spine in axes.spines.values():
        spine.set(color=frame or "#d0d7de", linewidth=2 if frame else 1)
