"""The report of a run: one self-contained HTML file, and its images as PNG files."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from metamorph.evaluation.questions import AnsweredQuestion
from metamorph.files.templates import data_url, render
from metamorph.miniature.quickstart.evaluate import WorldEvaluation, seen_color
from metamorph.miniature.quickstart.figures import Cell, drawing_cell, save_accuracies, save_grid, verdict_text
from metamorph.miniature.quickstart.workspace import REPORT_FILE, Workspace
from metamorph.runs.progress import duration


CARDS_PER_SECTION = 32
"""Samples of each kind in the report: the first ones, not hand-picked."""


@dataclass(frozen=True)
class Section:
    """A section of the report, and the PNG file with the same images."""

    name: str
    title: str
    text: str
    cells: Sequence[Cell]


def write_report(space: Workspace, evaluation: WorldEvaluation, metrics: dict[str, Any]) -> None:
    """Write report.html, with the loss curves already in `space.figures`, and the PNG files next to it."""
    text = render(
        "quickstart.html.jinja",
        metrics=metrics,
        minutes=duration(metrics["seconds"]["total"]),
        headline=headline(metrics),
        model=shlex.quote(str(space.model)),
        visualizer=shlex.quote(str(space.visualizer)),
        sections=save_sections(space.figures, evaluation, metrics),
        curves=Image.open(space.figures / "losses.png"),
        data_url=data_url,
        recipe=yaml.safe_dump({"recipe": metrics["recipe"], "versions": metrics["versions"]}, sort_keys=False),
    )
    (space.root / REPORT_FILE).write_text(text, encoding="utf-8")


def headline(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the main table: `label`, `n`, `value` and `floor` as text, and `mark`: right, wrong or soft."""
    drawn, start = metrics["generation"], metrics["image_start"]
    num_seen = drawn["seen"]["n"] + drawn["pairs"]["n"]
    num_replies = start["asked"]["n"] + start["not_asked"]["n"]
    attributes = {"colour": "color", "shape": "shape", "size": "size", "position": "position"}
    rows: list[tuple[Any, ...]] = [
        ("questions answered exactly", metrics["vqa"]["n"], metrics["vqa"]["accuracy"], "vqa"),
        *(
            (f"  about {name.replace('_', '/')}", metrics["vqa"]["n_per_type"][name], value)
            for name, value in metrics["vqa"]["per_type"].items()
        ),
        ("an image if and only if asked for one", num_replies, start["accuracy"], "image_start"),
        ("drawings completely right: one object", drawn["seen"]["n"], drawn["seen"]["all"]),
        *((f"  {label}", drawn["seen"]["n"], drawn["seen"][name]) for label, name in attributes.items()),
        ("drawings: two objects", drawn["pairs"]["n"], drawn["pairs"]["all"]),
        ("drawings: colours, one and two objects", num_seen, seen_color(drawn), "seen_color"),
        ("drawings: colour and shape never drawn together", drawn["held_out"]["n"], drawn["held_out"]["all"]),
        ("drawings: prompts that need a fact", drawn["knowledge"]["n"], drawn["knowledge"]["all"]),
        ("edits", metrics["edit"]["n"], metrics["edit"]["all"]),
        ("next frames", metrics["next_frame"]["n"], metrics["next_frame"]["all"]),
        ("visualizer alone, from true tokens", metrics["visualizer"]["n"], metrics["visualizer"]["all"]),
    ]
    return [_headline_row(metrics["floors"], *row) for row in rows]


def save_sections(folder: Path, evaluation: WorldEvaluation, metrics: dict[str, Any]) -> list[Section]:
    """Write a PNG file for each section of the report, and one of the accuracies; returns the sections in order."""
    drawn, drawings, most = metrics["generation"], evaluation.drawings, CARDS_PER_SECTION
    plain = (
        ("seen", "Drawn from words", "Training drew this colour and shape together, but not this scene."),
        ("pairs", "Drawn from words: two objects", "As above."),
        ("held_out", "Never drawn together", "No training answer shows this colour with this shape."),
        ("knowledge", "Drawn with knowledge", "The prompt names a thing that training described in words only."),
    )
    sections = [
        Section(name, title, f"{text} {_share(drawn[name])}", [drawing_cell(item) for item in drawings[name][:most]])
        for name, title, text in plain
    ]
    for name, title, text in (
        ("edit", "Edits", "Left: the given image; right: the model's."),
        ("next_frame", "Next frames", "Two frames were given; the model drew the third."),
    ):
        cells = [drawing_cell(item, with_inputs=True) for item in drawings[name][:most]]
        sections.append(Section(name, title, f"{text} {_share(metrics[name])}", cells))
    text = f"{metrics['vqa']['accuracy']:.0%} of {metrics['vqa']['n']} answers are exactly right."
    cells = [_question_cell(item) for item in evaluation.questions[:most]]
    sections.append(Section("vqa", "Questions and answers", text, cells))
    cells = [
        Cell((item.original, item.image), "", verdict_text(item.verdict), item.verdict["all"])
        for item in evaluation.reconstructions[:most]
    ]
    text = "Left: an image; right: the visualizer's drawing of its true visual tokens, without the language model."
    sections.append(Section("visualizer", "The visualizer alone", f"{text} {_share(metrics['visualizer'])}", cells))
    folder.mkdir(parents=True, exist_ok=True)
    for section in sections:
        save_grid(folder / f"{section.name}.png", section.title, section.cells)
    save_accuracies(folder / "vqa_types.png", metrics["vqa"]["per_type"])
    return sections


def _headline_row(floors: dict[str, Any], label: str, n: int, value: float, floor_name: str = "") -> dict[str, Any]:
    row = {"label": label, "n": n, "value": f"{value:.1%}", "floor": "", "mark": "soft"}
    if floor_name in floors:
        reached = floors[floor_name]["reached"]
        sign = "≥" if reached else "below"
        row |= {"floor": f"{sign} {floors[floor_name]['floor']:.0%}", "mark": "right" if reached else "wrong"}
    return row


def _question_cell(item: AnsweredQuestion) -> Cell:
    """A question about an image, its answer and, if that is wrong, the right one."""
    question = str(item.question.prompt.text).replace("<image>", "").strip()
    given = item.reply.text or "(nothing)"
    answer = given if item.is_right else f"{given}, not {item.question.answer}"
    return Cell(item.question.prompt.images, question, answer, item.is_right)


def _share(summary: dict[str, Any]) -> str:
    return f"{summary['all']:.0%} of {summary['n']} are completely right."
