"""Runs a benchmark: prompts to answers to scores, in one folder; resumed after a kill, with any number of processes.

The folder has `prompts.jsonl` and `answers.jsonl`, as of `metamorph generate --input`, images in `answers`, and the
results: `result.json` and `table.md`.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from metamorph.evaluation.benchmarks.result import (
    RESULT_FILE,
    TABLE_FILE,
    hash_media,
    identify,
    make_result,
    write_result,
)
from metamorph.evaluation.benchmarks.spec import Spec
from metamorph.evaluation.metrics.base import Scores, Tools
from metamorph.evaluation.samples import Answer, Sample
from metamorph.inference.answer_files import TOKENS_SUFFIX
from metamorph.inference.batch_file import Batch, open_results, run_batch
from metamorph.inference.session import Session, pick_device
from metamorph.runs.checkpoint_files import on_first_process
from metamorph.runs.progress import Progress


logger = logging.getLogger(__name__)

PROMPTS_FILE = "prompts.jsonl"
ANSWERS_FILE = "answers.jsonl"


def run_spec(
    spec: Spec,
    model: str,
    visualizer: str | None,
    output_dir: Path,
    open_session: Callable[[], Session],
    *,
    data_path: Path | None = None,
    batch_size: int = 8,
    limit: int | None = None,
    dtype: str = "auto",
    device: torch.device | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Answer and judge a benchmark, and write the results; returns the content of `result.json`.

    Every process calls this. The first one judges and gets the result, the others wait and get an empty one. Neither
    batch size nor number of processes matter. Answers that are in the folder already are not asked for again, but
    judged again.

    Args:
        model: Folder or Hub id, or `mini`; identifies the model, which `open_session` loads when it is needed.
        data_path: By default that of the spec.
        limit: Ask about this many samples, evenly spaced; they have the answers of a full run.
        dtype: Precision of the model, as in [`BatchDefaults`].
        device: Of the metric; by default the accelerator if there is one.

    Raises:
        FileNotFoundError: If the data are missing.
        ValueError: Before the model is loaded: if the data do not fit the spec, a visualizer is missing, or the folder
            has results of something else.
    """
    check_visualizer_is_due(spec, visualizer)
    batch = Batch(
        output_dir / PROMPTS_FILE,
        output_dir / ANSWERS_FILE,
        model,
        visualizer,
        spec.decoding.defaults(spec.seed, dtype),
        keep_tokens=spec.metric.needs_visual_tokens,
        name_of=lambda setting: name_of(setting, spec),
    )
    # Prompts take their place once the folder is known to be theirs.
    partial = batch.source.with_suffix(".partial")
    samples: list[Sample] = []  # only of the first process

    def prepare() -> tuple[int, str]:
        samples.extend(_prepare(spec, partial, data_path, limit))
        return len(samples), hash_media(samples)

    total, media = on_first_process(prepare)
    try:
        done = open_results(replace(batch, source=partial, media=media), overwrite=overwrite)
    except ValueError:
        partial.unlink(missing_ok=True)
        raise

    def begin() -> None:
        partial.replace(batch.source)
        if done < total:  # they are of other answers
            for name in (RESULT_FILE, TABLE_FILE):
                (output_dir / name).unlink(missing_ok=True)

    on_first_process(begin)
    if done:
        logger.info("%s has %d of %d answers already", output_dir, done, total)
    session = cache(open_session)
    if done < total:
        run_batch(session(), batch, done, batch_size)
    result: dict[str, Any] = {}

    def judge() -> None:
        answers = read_answers(batch)
        with Progress(desc="judging", total=len(samples), unit="answer") as progress:
            tools = Tools(device or pick_device(), session, progress, output_dir)
            scores = spec.metric.score(samples, answers, tools)
            _check_finite(spec, samples, scores)
            of_set = spec.metric.of_set(samples, answers, tools)
        run = {
            "model": identify(model, "model"),
            "visualizer": visualizer and identify(visualizer, "visualizer"),
            "data": {"path": str(data_path or spec.path), "limit": limit},
            "dtype": dtype,
            "device": tools.device.type,
        }
        result.update(make_result(spec, samples, _relative(answers, output_dir), scores, of_set, run))
        write_result(result, output_dir)

    on_first_process(judge)
    return result


def check_visualizer_is_due(spec: Spec, visualizer: str | None) -> None:
    """Raise a `ValueError` if a visualizer is missing, or has nothing to draw."""
    if visualizer is None and spec.metric.needs_images:
        raise ValueError(f"{spec.name} judges images: give the --visualizer that draws them")
    if visualizer is not None and not spec.draws:
        raise ValueError(f"--visualizer {visualizer} has no effect: {spec.name} judges text; leave it out")


def name_of(setting: str, spec: Spec) -> str:
    """What errors call a setting of the file of prompts."""
    names = {
        "input": "data, prompt or --limit",
        "media": "content of images or videos",
        "output": "--output-dir",
        "keep_tokens": "kept visual tokens",
    }
    flags = ("model", "visualizer", "dtype")
    return names.get(setting) or (f"--{setting}" if setting in flags else f"{setting} of {spec.name}")


def _prepare(spec: Spec, prompts: Path, data_path: Path | None, limit: int | None) -> Sequence[Sample]:
    """Load and check the samples, and write their prompts."""
    chosen = spec.choose(data_path, limit)
    prompts.parent.mkdir(parents=True, exist_ok=True)
    with prompts.open("w", encoding="utf-8") as file:
        for number, sample in chosen:
            file.write(json.dumps(_line(spec, number, sample), ensure_ascii=False) + "\n")
    return [sample for _, sample in chosen]


def _line(spec: Spec, number: int, sample: Sample) -> dict[str, Any]:
    """A line of the file of prompts; its seed does not depend on which other samples are asked about."""
    paths = {
        name: [path if path.startswith("data:") else str(Path(path).absolute()) for path in getattr(sample, name)]
        for name in ("images", "videos")
    }
    asked: dict[str, Any] = {"prompt": spec.prompt_of(sample)}
    if sample.history:
        asked = {"messages": [*map(dict, sample.history), {"role": "user", "content": asked["prompt"]}]}
    return {
        "id": sample.id,
        **asked,
        **{name: values for name, values in paths.items() if values},
        "seed": spec.seed + number * spec.decoding.num_images,  # no two drawings start from the same noise
    }


def _check_finite(spec: Spec, samples: Sequence[Sample], scores: Sequence[Scores]) -> None:
    """Raise a `ValueError` for NaN or infinity, which would make figures of them and is no JSON."""
    for sample, each in zip(samples, scores, strict=True):
        for name, value in each.items():
            if not math.isfinite(value):
                raise ValueError(
                    f"{spec.name}: {name} of sample {sample.id} is {value}: its answer or data are damaged"
                )


def read_answers(batch: Batch) -> list[Answer]:
    """The answers in the file of results."""
    with batch.results.open(encoding="utf-8") as file:
        return [_answer(json.loads(line), batch) for line in file]


def _answer(line: dict[str, Any], batch: Batch) -> Answer:
    if "error" in line:
        return Answer(error=line["error"])
    files = [
        [batch.results.parent / name for name in part["files"]] for part in line["parts"] if part["type"] == "image"
    ]
    drawn = (file for each in files for file in each if file.suffix != TOKENS_SUFFIX)
    tokens = (each[0].with_suffix(TOKENS_SUFFIX) for each in files) if batch.keep_tokens else ()
    return Answer(line["text"], tuple(drawn), tuple(tokens))


def _relative(answers: Sequence[Answer], folder: Path) -> list[Answer]:
    """The answers with their images relative to the folder of the results, which may then be moved."""
    return [
        Answer(answer.text, tuple(image.relative_to(folder) for image in answer.images), error=answer.error)
        for answer in answers
    ]
