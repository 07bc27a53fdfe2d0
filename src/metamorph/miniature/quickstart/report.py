"""The report of a run: one HTML file with its pictures in it, and the same pictures as PNG files."""

from __future__ import annotations

import base64
import io
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment
from PIL import Image

from metamorph.evaluation.questions import AnsweredQuestion
from metamorph.miniature.quickstart.evaluate import WorldEvaluation, seen_color
from metamorph.miniature.quickstart.figures import (
    Cell,
    LossCurves,
    drawing_cell,
    redrawing_cell,
    save_accuracies,
    save_curves,
    save_grid,
)
from metamorph.miniature.quickstart.options import REPORT_FILE
from metamorph.miniature.quickstart.report_template import TEMPLATE
from metamorph.miniature.quickstart.stages import Workspace
from metamorph.runs.progress import duration


CARDS_PER_SECTION = 32
"""Pictures of each kind that the report shows: the first ones, not chosen."""


@dataclass(frozen=True)
class Section:
    """A part of the report with pictures."""

    name: str
    """Name of its PNG file."""
    title: str
    """Heading."""
    text: str
    """What is shown, and how much of it is right."""
    cells: Sequence[Cell]
    """The pictures."""


def write_report(space: Workspace, evaluation: WorldEvaluation, curves: LossCurves, metrics: dict[str, Any]) -> Path:
    """Write report.html and the PNG files beside it.

    Args:
        space: Where to write.
        evaluation: What was asked, answered and drawn.
        curves: Losses of the three trainings.
        metrics: Content of metrics.json.

    Returns:
        The path of the HTML file.
    """
    space.pictures.mkdir(parents=True, exist_ok=True)
    sections = make_sections(evaluation, metrics)
    for section in sections:
        save_grid(space.pictures / f"{section.name}.png", section.title, section.cells[:CARDS_PER_SECTION])
    save_accuracies(space.pictures / "vqa_types.png", metrics["vqa"]["per_type"])
    losses = save_curves(space.pictures / "losses.png", curves)
    stages = [
        {
            "name": name,
            "seconds": seconds,
            "cpu": metrics["cpu_seconds"].get(name, ""),
            "memory": metrics["peak_rss_mb_per_stage"].get(name, ""),
        }
        for name, seconds in metrics["seconds"].items()
    ]
    text = (
        Environment(autoescape=True)
        .from_string(TEMPLATE)
        .render(
            metrics=metrics,
            minutes=duration(metrics["seconds"]["total"]),
            headline=headline(metrics),
            model=shlex.quote(str(space.model)),
            visualizer=shlex.quote(str(space.visualizer)),
            sections=[{"title": section.title, "text": section.text, "cards": _cards(section)} for section in sections],
            curves=data_url(Image.open(losses)),
            stages=stages,
            recipe=yaml.safe_dump({"recipe": metrics["recipe"], "versions": metrics["versions"]}, sort_keys=False),
        )
    )
    path = space.root / REPORT_FILE
    path.write_text(text, encoding="utf-8")
    return path


def headline(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the main table: `label`, `n`, `value` and `floor` as text, and `mark`, right or wrong."""
    drawn, start = metrics["generation"], metrics["image_start"]
    seen_total = drawn["seen"]["n"] + drawn["pairs"]["n"]
    rows: list[tuple[str, int, float, str | None]] = [
        ("questions answered exactly", metrics["vqa"]["n"], metrics["vqa"]["accuracy"], "vqa"),
        *(
            (f"  about {name.replace('_', '/')}", metrics["vqa"]["n_per_type"][name], value, None)
            for name, value in metrics["vqa"]["per_type"].items()
        ),
        (
            "a picture when asked for one, and only then",
            start["asked"]["n"] + start["not_asked"]["n"],
            start["accuracy"],
            "image_start",
        ),
        ("drawings right in everything: one object", drawn["seen"]["n"], drawn["seen"]["all"], None),
        ("  colour", drawn["seen"]["n"], drawn["seen"]["color"], None),
        ("  shape", drawn["seen"]["n"], drawn["seen"]["shape"], None),
        ("  size", drawn["seen"]["n"], drawn["seen"]["size"], None),
        ("  position", drawn["seen"]["n"], drawn["seen"]["position"], None),
        ("drawings: two objects", drawn["pairs"]["n"], drawn["pairs"]["all"], None),
        ("drawings: colours, one and two objects", seen_total, seen_color(drawn), "seen_color"),
        ("drawings: colour and shape never drawn together", drawn["held_out"]["n"], drawn["held_out"]["all"], None),
        ("drawings: prompts that need a fact", drawn["knowledge"]["n"], drawn["knowledge"]["all"], None),
        ("edits", metrics["edit"]["n"], metrics["edit"]["all"], None),
        ("next frames", metrics["next_frame"]["n"], metrics["next_frame"]["all"], None),
        ("visualizer alone, from true tokens", metrics["visualizer"]["n"], metrics["visualizer"]["all"], None),
    ]
    return [_headline_row(metrics["floors"], *row) for row in rows]


def make_sections(evaluation: WorldEvaluation, metrics: dict[str, Any]) -> list[Section]:
    """Everything with pictures, in the order of the report."""
    drawn, drawings = metrics["generation"], evaluation.drawings
    plain = (
        ("seen", "Drawn from words", "Colour and shape were drawn together in training, this scene was not."),
        ("pairs", "Drawn from words: two objects", "As above."),
        ("held_out", "Never drawn together", "No training answer shows this colour with this shape."),
        ("knowledge", "Drawn with knowledge", "The prompt names a thing, of which training only told in words."),
    )
    sections = [
        Section(name, title, f"{text} {_share(drawn[name])}", [drawing_cell(item) for item in drawings[name]])
        for name, title, text in plain
    ]
    for name, title, text in (
        ("edit", "Edits", "Left the picture that was given, right what the model made of it."),
        ("next_frame", "Next frames", "Two frames were given, the model drew the third."),
    ):
        cells = [drawing_cell(item, with_inputs=True) for item in drawings[name]]
        sections.append(Section(name, title, f"{text} {_share(metrics[name])}", cells))
    questions = [_question_cell(item) for item in evaluation.questions.answered]
    text = f"{metrics['vqa']['accuracy']:.0%} of {metrics['vqa']['n']} answers are exactly right."
    sections.append(Section("vqa", "Questions and answers", text, questions))
    redrawn = [redrawing_cell(item) for item in evaluation.redrawings]
    text = "Left a picture, right what the visualizer made of its true visual tokens, without the language model."
    sections.append(Section("visualizer", "The visualizer alone", f"{text} {_share(metrics['visualizer'])}", redrawn))
    return sections


def data_url(picture: Image.Image) -> str:
    """A picture as PNG inside a URL."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _headline_row(floors: dict[str, Any], label: str, n: int, value: float, floor_name: str | None) -> dict[str, Any]:
    row = {"label": label, "n": n, "value": f"{value:.1%}", "floor": "", "mark": "soft"}
    if floor_name in floors:
        reached = floors[floor_name]["reached"]
        sign = "≥" if reached else "below"
        row |= {"floor": f"{sign} {floors[floor_name]['floor']:.0%}", "mark": "right" if reached else "wrong"}
    return row


def _question_cell(item: AnsweredQuestion) -> Cell:
    """A question about a picture with the answer, and the right one if that was another."""
    question = item.question.prompt.text.replace("<image>", "").strip()
    given = item.reply.text or "(nothing)"
    answer = given if item.is_right else f"{given}, not {item.question.answer}"
    return Cell(item.question.prompt.images, f"{question}\n{answer}", item.is_right)


def _cards(section: Section) -> list[dict[str, Any]]:
    cards = []
    for cell in section.cells[:CARDS_PER_SECTION]:
        text, _, verdict = cell.text.rpartition("\n")
        pictures = [picture and data_url(picture) for picture in cell.pictures]
        cards.append({"pictures": pictures, "text": text, "verdict": verdict, "is_right": cell.is_right})
    return cards


def _share(summary: dict[str, Any]) -> str:
    return f"{summary['all']:.0%} of {summary['n']} are right in everything."
