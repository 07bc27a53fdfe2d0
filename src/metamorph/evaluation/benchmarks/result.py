"""`result.json`: everything that decided a result, every answer, and the figures; the same for the same command."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from metamorph import __version__
from metamorph.evaluation.benchmarks.intervals import by_category, figures
from metamorph.evaluation.benchmarks.spec import Spec
from metamorph.evaluation.metrics.base import Scores
from metamorph.evaluation.samples import Answer, Sample
from metamorph.inference.batch_file import model_files
from metamorph.mini import shipped_folder
from metamorph.models.adapters import is_adapter_folder, read_adapter_base


RESULT_FILE = "result.json"
TABLE_FILE = "table.md"
VOLATILE = ("date",)
"""What differs between two runs of the same command."""
_PACKAGES = ("torch", "transformers", "diffusers", "numpy", "pillow")


def make_result(
    spec: Spec,
    samples: Sequence[Sample],
    answers: Sequence[Answer],
    scores: Sequence[Scores],
    of_set: Mapping[str, float],
    run: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of `result.json`; `run` says what was run: model, visualizer, data, dtype and device."""
    hashes = [hash_sample(sample) for sample in samples]
    metric = spec.metric
    first: dict[str, str] = {}
    units = [first.setdefault(metric.unit(sample), sample.id) for sample in samples]
    return {
        "benchmark": spec.name,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "headline": metric.headline,
        "lower_is_better": metric.lower_is_better,
        "summary": {
            **figures(metric, samples, scores),
            **{name: {"value": value, "n": len(samples)} for name, value in of_set.items()},
        },
        "categories": {
            kind: {
                category: figures(
                    metric, [samples[number] for number in numbers], [scores[number] for number in numbers]
                )
                for category, numbers in categories.items()
            }
            for kind, categories in by_category(samples).items()
        },
        "errors": sum(answer.error is not None for answer in answers),
        **run,
        "data": {**run["data"], "samples": len(samples), "sha256": _hash_texts(hashes)},
        "spec": {"sha256": spec.sha256, "content": spec.content},
        "seed": spec.seed,
        "versions": versions(),
        "answers": [
            {
                "id": sample.id,
                "text": answer.text,
                "images": [str(image) for image in answer.images],
                "error": answer.error,
                "scores": dict(each),
                "fields": dict(sample.fields),
                "reference": sample.reference,
                "categories": dict(sample.categories),
                "unit": unit,  # the first sample that it is resampled together with
                "sample_sha256": own,
            }
            for sample, answer, each, unit, own in zip(samples, answers, scores, units, hashes, strict=True)
        ],
    }


def table(result: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows of the figures: those of all samples, then the headline of each category."""
    rows: list[tuple[str, ...]] = [(name, *_cells(figure)) for name, figure in result["summary"].items()]
    for kind, categories in result["categories"].items():
        for category, found in categories.items():
            if result["headline"] in found:
                rows.append((f"{result['headline']}, {kind} {category}", *_cells(found[result["headline"]])))
    return ("figure", "value", "95 % interval", "n"), rows


def table_text(result: Mapping[str, Any]) -> str:
    """`table.md`: what was run, and the table."""
    model, visualizer = result["model"], result["visualizer"]
    drawn = f", drawn by {_identified(visualizer)}" if visualizer else ""
    header, rows = table(result)
    lines = [
        f"# {result['benchmark']}",
        "",
        f"{_identified(model)}{drawn}; {result['data']['samples']} samples, seed {result['seed']}, "
        f"MetaMorph {result['versions']['metamorph']}, spec {result['spec']['sha256'][:12]}",
        "",
        f"| {' | '.join(header)} |",
        "|---|---:|---:|---:|",
        *(f"| {' | '.join(map(_escaped, row))} |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def write_result(result: Mapping[str, Any], folder: Path) -> None:
    """Write `result.json` and `table.md`."""
    for name, text in (
        (RESULT_FILE, json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n"),
        (TABLE_FILE, table_text(result)),
    ):
        partial = folder / f"{name}.partial"
        partial.write_text(text, encoding="utf-8")
        partial.replace(folder / name)


def read_result(file: Path) -> dict[str, Any]:
    """Read a `result.json`; a `ValueError` if the file is something else."""
    if file.is_dir():
        file = file / RESULT_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist: give a {RESULT_FILE} of `metamorph evaluate`, or its folder")
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error})") from error
    if not isinstance(result, dict) or not {"benchmark", "spec", "answers", "versions"} <= result.keys():
        raise ValueError(f"{file} is not a {RESULT_FILE} of `metamorph evaluate SPEC`")
    return result


def identify(reference: str, part: str) -> dict[str, Any]:
    """Name and SHA-256 of a model or visualizer; `part` is as in `shipped_folder`.

    The hash covers names and contents of all weights and settings, so every byte is read once. It is None for a model
    that is in no folder, such as one that is being trained. An adapter also has `base`, the parts it was trained on.
    """
    folder = Path(shipped_folder(reference, part))
    if not folder.is_dir():
        cached = try_to_load_from_cache(reference, "model_index.json" if part == "visualizer" else "config.json")
        if not isinstance(cached, str):
            return {"name": reference, "sha256": None}
        folder = Path(cached).parent
    lines = [f"{file.relative_to(folder).as_posix()} {_hash_file(file)}" for file in model_files(folder)]
    found: dict[str, Any] = {"name": reference, "sha256": _hash_texts(lines)}
    if is_adapter_folder(folder):
        base = read_adapter_base(folder)
        parts = {"model": base.language_model, "tower": base.vision_tower}
        found["base"] = {kind: identify(name, kind) for kind, name in parts.items() if name is not None}
    return found


def hash_sample(sample: Sample) -> str:
    """SHA-256 of what a sample asks: its texts, reference and categories, and the content of its media."""
    media = [_hash_media(name) for name in (*sample.images, *sample.videos)]
    files = {name: _hash_media(file) for name, file in sample.files.items()}
    texts = [dict(sample.fields), sample.reference, dict(sample.categories), [*map(dict, sample.history)]]
    parts = [sample.id, *texts, media, files]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def hash_media(samples: Sequence[Sample]) -> str:
    """SHA-256 of the content of the images and videos that a model is shown; data URLs are part of its prompts."""
    names = dict.fromkeys(name for sample in samples for name in (*sample.images, *sample.videos))
    return _hash_texts([str(_hash_file(Path(name))) for name in names if not name.startswith("data:")])


def versions() -> dict[str, str | None]:
    """Versions of what computes answers; None if a package is not installed."""
    found: dict[str, str | None] = {"metamorph": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _hash_media(name: str) -> str | None:
    """That of a file, or of a data URL."""
    return hashlib.sha256(name.encode()).hexdigest() if name.startswith("data:") else _hash_file(Path(name))


def _hash_file(file: Path) -> str | None:
    """None if the file is missing: its sample has an error as its answer."""
    if not file.is_file():
        return None
    with file.open("rb") as opened:
        digest = hashlib.sha256()
        while block := opened.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _hash_texts(texts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def _escaped(cell: str) -> str:
    """A cell that does not end the table: names of categories may be any text."""
    return " ".join(cell.split()).replace("|", "\\|")


def _cells(figure: Mapping[str, Any]) -> tuple[str, str, str]:
    ends = f"{figure['low']:.4f} to {figure['high']:.4f}" if "low" in figure else "-"
    return f"{figure['value']:.4f}", ends, f"{figure['n']:,}"


def _identified(part: Mapping[str, Any]) -> str:
    return f"{part['name']} ({part['sha256'][:12]})" if part["sha256"] else str(part["name"])
