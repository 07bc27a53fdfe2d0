"""What the doctor found, as report.json for programs and report.html for the eye."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment
from PIL import Image

from metamorph.data.batching.packing import pack_rows
from metamorph.data.doctor.check import WARNINGS, CheckedDataset, Diagnosis, line_of
from metamorph.data.doctor.page import PAGE
from metamorph.data.doctor.samples import pictures_of, split_example, text_of
from metamorph.data.records import BAD_RECORD_KINDS
from metamorph.models.processing_metamorph import MetaMorphProcessor


JSON_FILE = "report.json"
HTML_FILE = "report.html"
SHOWN_PER_KIND = 20
"""Problems of each kind that the page lists; report.json has all."""
PICTURE_SIDE = 160
"""Largest side in pixels of the pictures on the page."""
_BINS = 24
"""Bars of a histogram, at most."""
AREA_EDGES = (0, 0.01, 0.1, 1, 5, 20, 50, 99)
"""Where the bars of the histogram of boxes begin, in per cent of the image."""
_FEW = 8
"""So many bars have room for a label each."""


@dataclass(frozen=True)
class Sample:
    """An example for the page."""

    title: str
    """Source, line and id."""
    example: dict[str, Any]
    """As the data set gave it."""


def write_reports(
    folder: Path, diagnosis: Diagnosis, samples: Sequence[Sample], processor: MetaMorphProcessor
) -> tuple[Path, Path]:
    """Write report.json and report.html.

    Args:
        folder: Where to; made if needed.
        diagnosis: What was found.
        samples: Examples to show with their label masks.
        processor: Made the examples.

    Returns:
        The two paths.
    """
    folder.mkdir(parents=True, exist_ok=True)
    report = make_report(diagnosis)
    json_path, html_path = folder / JSON_FILE, folder / HTML_FILE
    json_path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    html_path.write_text(render_page(diagnosis, report, samples, processor), encoding="utf-8")
    return json_path, html_path


def pick_samples(dataset: CheckedDataset, diagnosis: Diagnosis, count: int) -> list[Sample]:
    """Examples of records in order, evenly spread over each source.

    Args:
        dataset: The data.
        diagnosis: Says which records are in order.
        count: About how many in all; each source has at least one.
    """
    samples = []
    probes = diagnosis.probes[diagnosis.probes["problems"] == 0]
    share = max(1, count // max(1, len(diagnosis.sources)))
    for number, name in enumerate(diagnosis.sources):
        indices = probes["index"][probes["source"] == number]
        chosen = np.linspace(0, len(indices) - 1, min(share, len(indices))).astype(int)
        for index in indices[chosen].tolist():
            record = dataset.record(index)
            title = f"{name}:{line_of(record.where, index)}" + (f" · {record.id}" if record.id != record.where else "")
            title = title.encode("utf-8", "backslashreplace").decode()  # an id may hold half a character
            samples.append(Sample(title, dataset[index]))
    return samples


def make_report(diagnosis: Diagnosis) -> dict[str, Any]:
    """The content of report.json: `records` checked, `ok` ones among them, all `problems`, `by_kind`, `statistics`."""
    return {
        "records": len(diagnosis.probes),
        "ok": diagnosis.num_ok,
        "problems": [asdict(problem) for problem in diagnosis.problems],
        "by_kind": diagnosis.by_kind(),
        "statistics": make_statistics(diagnosis),
    }


def make_statistics(diagnosis: Diagnosis) -> dict[str, Any]:
    """Numbers on the records that can be trained on, in all and for each source."""
    probes = diagnosis.probes
    usable = probes[probes["tokens"] >= 0]
    statistics: dict[str, Any] = {
        "total_records": diagnosis.total_records,
        "usable_records": len(usable),
        "seconds": round(diagnosis.seconds, 2),
        "records_per_second": round(len(probes) / max(diagnosis.seconds, 1e-9), 1),
        "model_max_length": diagnosis.model_max_length,
        **{name: _summary(usable[name]) for name in ("tokens", "text_targets", "images", "answer_images")},
        "box_shares": _box_summary(diagnosis.box_shares),
        "packing": packing(usable["kept_tokens"], diagnosis.model_max_length),
        "settings": diagnosis.settings,
        "note": diagnosis.note,
    }
    statistics["sources"] = {
        name: _source_row(probes[probes["source"] == number]) for number, name in enumerate(diagnosis.sources)
    }
    return statistics


def packing(lengths: np.ndarray, model_max_length: int | None) -> dict[str, Any] | None:
    """How full the rows of `model_max_length` tokens are, packed and with one record in each.

    Args:
        lengths: int `[records]` tokens of each record, as trained on.
        model_max_length: Tokens of a row; None if lengths were not judged.

    Returns:
        `rows`, `efficiency` and `unpacked_efficiency` (shares of tokens that are no padding); None without lengths.
    """
    if model_max_length is None or not len(lengths):
        return None
    rows = len(
        pack_rows(lengths, max_length=model_max_length, order=np.random.default_rng(0).permutation(len(lengths)))
    )
    tokens = int(lengths.sum())
    return {
        "rows": rows,
        "efficiency": round(tokens / (rows * model_max_length), 4),
        "unpacked_efficiency": round(tokens / (len(lengths) * model_max_length), 4),
    }


def render_page(
    diagnosis: Diagnosis, report: dict[str, Any], samples: Sequence[Sample], processor: MetaMorphProcessor
) -> str:
    """The page as HTML, with its pictures in it."""
    usable = diagnosis.probes[diagnosis.probes["tokens"] >= 0]
    statistics = report["statistics"]
    kinds = [
        {
            "name": kind,
            "count": count,
            "meaning": {**BAD_RECORD_KINDS, **WARNINGS}.get(kind, ""),
            "problems": [problem for problem in diagnosis.problems if problem.kind == kind][:SHOWN_PER_KIND],
        }
        for kind, count in report["by_kind"].items()
    ]
    histograms = [
        _histogram("Tokens of a record", usable["tokens"], diagnosis.model_max_length),
        _histogram("Tokens with text loss", usable["text_targets"]),
        _histogram("Images of a record", usable["images"]),
        _histogram("Answer images of a record", usable["answer_images"]),
        _box_histogram(statistics["box_shares"]),
    ]
    return (
        Environment(autoescape=True)
        .from_string(PAGE)
        .render(
            report=report,
            statistics=statistics,
            kinds=kinds,
            histograms=[item for item in histograms if item],
            samples=[_sample_card(sample, processor) for sample in samples],
            quantities={
                "tokens": "tokens",
                "text_targets": "tokens with text loss",
                "images": "images",
                "answer_images": "answer images",
            },
        )
    )


def _summary(values: np.ndarray) -> dict[str, Any]:
    if not len(values):
        return {"total": 0, "mean": 0, "median": 0, "p95": 0, "max": 0}
    return {
        "total": int(values.sum()),
        "mean": round(float(values.mean()), 2),
        "median": int(np.quantile(values, 0.5, method="lower")),
        "p95": int(np.quantile(values, 0.95, method="higher")),
        "max": int(values.max()),
    }


def _box_summary(shares: np.ndarray) -> dict[str, Any] | None:
    """How much of their images boxes cover, in per cent; None without boxes."""
    if not len(shares):
        return None
    per_cent = 100 * shares.astype(np.float64)
    edges = [*AREA_EDGES, np.inf]
    counts = [int(((low <= per_cent) & (per_cent < high)).sum()) for low, high in pairwise(edges)]
    return {
        "boxes": len(shares),
        "median": round(float(np.median(per_cent)), 3),
        "at_least": [*AREA_EDGES],
        "count": counts,
    }


def _box_histogram(summary: dict[str, Any] | None) -> dict[str, Any] | None:
    """The areas of boxes as bars; the steps grow, because a box of the wrong unit has a millionth of its image."""
    if summary is None:
        return None
    counts, width = summary["count"], 100 / len(summary["count"])
    labels = [f"{low:g}–{high:g} %" for low, high in pairwise(AREA_EDGES)] + [f"{AREA_EDGES[-1]:g} % or more"]
    bars = [
        {
            "left": width * number,
            "width": width,
            "height": 100 * count / max(counts),
            "label": label,
            "count": count,
            "is_rest": False,
        }
        for number, (count, label) in enumerate(zip(counts, labels, strict=True))
    ]
    return {
        "title": "Area of a box, in per cent of its image",
        "unit": "boxes",
        "bars": bars,
        "few": True,
        "end": "",
        "highest": max(counts),
        "limit": None,
        "limit_left": None,
    }


def _source_row(probes: np.ndarray) -> dict[str, Any]:
    usable = probes[probes["tokens"] >= 0]
    return {
        "records": len(probes),
        "ok": int((probes["problems"] == 0).sum()),
        "problems": int(probes["problems"].sum()),
        "tokens": int(usable["tokens"].sum()),
        "text_targets": int(usable["text_targets"].sum()),
        "images": int(usable["images"].sum()),
        "answer_images": int(usable["answer_images"].sum()),
        "mean_tokens": round(float(usable["tokens"].mean()), 1) if len(usable) else 0,
        "max_tokens": int(usable["tokens"].max(initial=0)),
    }


def _histogram(title: str, values: np.ndarray, limit: int | None = None) -> dict[str, Any] | None:
    """Bars of a histogram in per cent of its drawing, and a mark at `limit`; None if there is nothing to draw.

    The longest hundredth is one bar at the end: a single record of ten thousand tokens would hide all others.
    """
    if not len(values) or not values.max():
        return None
    typical = int(np.quantile(values, 0.99, method="higher"))
    largest = int(values.max()) if values.max() <= 1.5 * max(typical, 1) else typical
    width = _bin_width(largest)
    counts = np.bincount(np.minimum(values, largest + width) // width)
    end = (largest // width + 1) * width
    bars = []
    for number, count in enumerate(counts.tolist()):
        low, is_rest = number * width, number * width >= end
        label = f"{low:,} or more" if is_rest else f"{low:,}" if width == 1 else f"{low:,}–{low + width - 1:,}"
        bars.append(
            {
                "left": 100 * number / len(counts),
                "width": 100 / len(counts),
                "height": 100 * count / counts.max(),
                "label": label,
                "count": count,
                "is_rest": is_rest,
            }
        )
    has_rest = len(counts) * width > end
    return {
        "title": title,
        "unit": "records",
        "bars": bars,
        "few": len(bars) <= _FEW,
        "end": f"{end:,} or more" if has_rest else f"{end:,}",
        "highest": int(counts.max()),
        "limit": limit,
        "limit_left": None if limit is None or limit >= end else 100 * limit / (len(counts) * width),
    }


def _bin_width(largest: int) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50, … that needs at most `_BINS` bars."""
    width = scale = 1
    while largest // width >= _BINS:
        step = width // scale
        if step == 5:
            scale *= 10
        width = {1: 2, 2: 5, 5: 1}[step] * scale
    return width


def _sample_card(sample: Sample, processor: MetaMorphProcessor) -> dict[str, Any]:
    pictures = [_data_url(picture) for picture in pictures_of(sample.example, processor.image_processor)]
    pieces = [
        {"kind": piece.kind, "text": text_of(piece, processor)}
        if piece.image is None
        else {"kind": piece.kind, "picture": pictures[piece.image], "tokens": len(piece.ids)}
        for piece in split_example(sample.example, processor)
    ]
    return {"title": sample.title, "pieces": pieces, "tokens": len(sample.example["input_ids"])}


def _data_url(picture: Image.Image) -> str:
    """A picture, made smaller, as JPEG inside a URL."""
    picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
