"""The result of `metamorph data check` as report.json for programs and report.html for people."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from metamorph.data.batching.packing import pack_rows
from metamorph.data.checks.check import WARNINGS, Diagnosis, line_of
from metamorph.data.checks.samples import images_of, split_example, text_of
from metamorph.data.checks.walk import spread
from metamorph.data.records import BAD_RECORD_KINDS
from metamorph.files.templates import data_url, render
from metamorph.models.processing_metamorph import MetaMorphProcessor


if TYPE_CHECKING:
    from metamorph.data.dataset import MixtureDataset

JSON_FILE = "report.json"
HTML_FILE = "report.html"
SHOWN_PER_KIND = 20
"""Problems of each kind that the page lists; report.json has all."""
IMAGE_SIDE = 160
"""Largest side in pixels of the images on the page."""
QUANTITIES = {
    "tokens": "tokens",
    "text_targets": "tokens with text loss",
    "images": "images",
    "answer_images": "answer images",
}
"""What is summed up for all records, and its name on the page."""
AREA_EDGES = (0, 0.01, 0.1, 1, 5, 20, 50, 99)
"""Where the bars of the histogram of boxes begin, in per cent of the image. The steps grow, because a box of the wrong
unit has a millionth of its image."""
_BINS = 24
"""Bars of a histogram, at most."""


Sample = tuple[str, dict[str, Any]]
"""An example for the page: a title (source, line and id), and the item of the data set."""


def write_reports(
    folder: Path, diagnosis: Diagnosis, samples: Sequence[Sample], processor: MetaMorphProcessor
) -> tuple[Path, Path]:
    """Write report.json and report.html, and return their paths; `samples` are shown with their label masks."""
    folder.mkdir(parents=True, exist_ok=True)
    report = make_report(diagnosis)
    json_path, html_path = folder / JSON_FILE, folder / HTML_FILE
    json_path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    usable = diagnosis.rows[diagnosis.rows["tokens"] >= 0]
    histograms = [
        _histogram("Tokens of a record", usable["tokens"], diagnosis.model_max_length),
        _histogram("Tokens with text loss", usable["text_targets"]),
        _histogram("Images of a record", usable["images"]),
        _histogram("Answer images of a record", usable["answer_images"]),
        _box_histogram(report["statistics"]["box_shares"]),
    ]
    page = render(
        "data_check.html.jinja",
        report=report,
        statistics=report["statistics"],
        meanings={**BAD_RECORD_KINDS, **WARNINGS},
        shown_per_kind=SHOWN_PER_KIND,
        histograms=[item for item in histograms if item],
        samples=[_sample_card(*sample, processor) for sample in samples],
        quantities=QUANTITIES,
    )
    html_path.write_text(page, encoding="utf-8")
    return json_path, html_path


def pick_samples(dataset: MixtureDataset, diagnosis: Diagnosis, count: int) -> list[Sample]:
    """About `count` examples of records that are in order, evenly spread over each source; at least one of each."""
    samples = []
    rows = diagnosis.rows[diagnosis.rows["problems"] == 0]
    share = max(1, count // max(1, len(diagnosis.sources)))
    for number, name in enumerate(diagnosis.sources):
        indices = rows["index"][rows["source"] == number]
        for index in indices[spread(len(indices), share)].tolist():
            source, place = dataset.locate(index)
            record = source.record(place)
            title = f"{name}:{line_of(record.where, index)}" + (f" · {record.id}" if record.id != record.where else "")
            title = title.encode("utf-8", "backslashreplace").decode()  # an id may contain half a character
            samples.append((title, dataset[index]))
    return samples


def make_report(diagnosis: Diagnosis) -> dict[str, Any]:
    """The content of report.json: `records` checked, `ok` ones among them, all `problems`, `by_kind`, `statistics`."""
    rows = diagnosis.rows
    usable = rows[rows["tokens"] >= 0]  # the records that can be trained on
    statistics = {
        "total_records": diagnosis.total_records,
        "usable_records": len(usable),
        "seconds": round(diagnosis.seconds, 2),
        "records_per_second": round(len(rows) / max(diagnosis.seconds, 1e-9), 1),
        "model_max_length": diagnosis.model_max_length,
        **{name: _summary(usable[name]) for name in QUANTITIES},
        "box_shares": _box_summary(diagnosis.box_shares),
        "packing": _packing(usable["kept_tokens"], diagnosis.model_max_length),
        "settings": diagnosis.settings,
        "note": diagnosis.note,
        "sources": {name: _source_row(rows[rows["source"] == number]) for number, name in enumerate(diagnosis.sources)},
    }
    return {
        "records": len(rows),
        "ok": diagnosis.num_ok,
        "problems": [asdict(problem) for problem in diagnosis.problems],
        "by_kind": diagnosis.by_kind(),
        "statistics": statistics,
    }


def _packing(lengths: np.ndarray, model_max_length: int | None) -> dict[str, Any] | None:
    """How full the rows of `model_max_length` tokens are, packed and with one record in each; None without lengths."""
    if model_max_length is None or not len(lengths):
        return None
    order = np.random.default_rng(0).permutation(len(lengths))
    rows = len(pack_rows(lengths, max_length=model_max_length, order=order))
    tokens = int(lengths.sum())
    return {
        "rows": rows,
        "efficiency": round(tokens / (rows * model_max_length), 4),
        "unpacked_efficiency": round(tokens / (len(lengths) * model_max_length), 4),
    }


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


def _source_row(rows: np.ndarray) -> dict[str, Any]:
    usable = rows[rows["tokens"] >= 0]
    return {
        "records": len(rows),
        "ok": int((rows["problems"] == 0).sum()),
        "problems": int(rows["problems"].sum()),
        **{name: int(usable[name].sum()) for name in QUANTITIES},
        "mean_tokens": round(float(usable["tokens"].mean()), 1) if len(usable) else 0,
        "max_tokens": int(usable["tokens"].max(initial=0)),
    }


def _box_summary(shares: np.ndarray) -> dict[str, Any] | None:
    """How much of their images boxes cover, in per cent; None without boxes."""
    if not len(shares):
        return None
    per_cent = 100 * shares.astype(np.float64)
    return {
        "boxes": len(shares),
        "median": round(float(np.median(per_cent)), 3),
        "at_least": [*AREA_EDGES],
        "count": np.histogram(per_cent, [*AREA_EDGES, np.inf])[0].tolist(),
    }


def _box_histogram(summary: dict[str, Any] | None) -> dict[str, Any] | None:
    if summary is None:
        return None
    labels = [f"{low:g}–{high:g} %" for low, high in pairwise(AREA_EDGES)] + [f"{AREA_EDGES[-1]:g} % or more"]
    return {
        "title": "Area of a box, in per cent of its image",
        "unit": "boxes",
        "bars": [
            {"label": label, "count": count, "is_rest": False}
            for label, count in zip(labels, summary["count"], strict=True)
        ],
        "highest": max(summary["count"]),
        "limit_left": None,
    }


def _histogram(title: str, values: np.ndarray, limit: int | None = None) -> dict[str, Any] | None:
    """Bars of a histogram, and the place of `limit` in per cent of its width; None if all values are 0.

    The longest hundredth is one bar at the end: a single record of ten thousand tokens would hide all others.
    """
    if not len(values) or not values.max():
        return None
    typical = int(np.quantile(values, 0.99, method="higher"))
    largest = int(values.max()) if values.max() <= 1.5 * max(typical, 1) else typical
    # The smallest width of 1, 2, 5, 10, 20, 50, … that needs at most `_BINS` bars.
    width = next(width for scale in range(12) for step in (1, 2, 5) if largest // (width := step * 10**scale) < _BINS)
    counts = np.bincount(np.minimum(values, largest + width) // width)
    end = (largest // width + 1) * width
    bars = []
    for number, count in enumerate(counts.tolist()):
        low, is_rest = number * width, number * width >= end
        label = f"{low:,} or more" if is_rest else f"{low:,}" if width == 1 else f"{low:,}–{low + width - 1:,}"
        bars.append({"label": label, "count": count, "is_rest": is_rest})
    return {
        "title": title,
        "unit": "records",
        "bars": bars,
        "highest": int(counts.max()),
        "limit_left": None if limit is None or limit >= end else 100 * limit / (len(counts) * width),
        "end": f"{end:,} or more" if bars[-1]["is_rest"] else f"{end:,}",
    }


def _sample_card(title: str, example: dict[str, Any], processor: MetaMorphProcessor) -> dict[str, Any]:
    images = images_of(example, processor.image_processor)
    for image in images:
        image.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
    pieces = [
        {
            "kind": piece.kind,
            "image": None if piece.image is None else data_url(images[piece.image], "JPEG"),
            "text": text_of(piece.ids, processor),
            "tokens": len(piece.ids),
        }
        for piece in split_example(example, processor)
    ]
    return {"title": title, "pieces": pieces, "tokens": len(example["input_ids"])}
