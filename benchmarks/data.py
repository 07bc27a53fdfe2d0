"""How full packed rows are, and how fast lengths are measured, batches planned and samples loaded.

    python benchmarks/data.py --output benchmarks/results/data.json

Prints a table and writes all numbers as JSON, with the machine, the versions and the command. Times of this process are
CPU times, so that other programs do not count; the loader's are wall-clock times, because its workers are separate
processes. All data is generated: lengths from a seed, images of random blocks as JPEG files. Tokenizer and image
processor are those of the quickstart, with images 384 pixels wide as for SigLIP-SO400M.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, LlamaConfig, LlamaModel, SiglipImageProcessorPil

from metamorph.data.batching.collation import PackedCollator
from metamorph.data.batching.lengths import Lengths, measure
from metamorph.data.batching.packing import BatchPlanner, PackedSamples, PlannedBatches
from metamorph.data.dataset import load_data
from metamorph.data.sources.json_files import scan_array, scan_lines
from metamorph.data.sources.open import open_source
from metamorph.mini import asset_path
from metamorph.models.packed_attention import mask_of_samples
from metamorph.models.processing_metamorph import MetaMorphProcessor


MAX_LENGTH = 4096
IMAGE_SIZE = 384
NUM_IMAGE_TOKENS = 64
PICTURE = (640, 480)
"""Width and height of the JPEG files."""


def main() -> None:
    """Run all parts, print a table and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/data.json"), help="JSON file to write")
    parser.add_argument("--samples", type=int, default=128, help="samples of the loader (default: %(default)s)")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = [*packing(), *planning()]
    with tempfile.TemporaryDirectory() as folder:
        rows += loading(Path(folder), flags.samples)
        rows += indexing(Path(folder))
        rows += cached_index(Path(folder))
    rows += attention()
    report = {"machine": machine(), "rows": rows}
    flags.output.parent.mkdir(parents=True, exist_ok=True)
    flags.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report["machine"], indent=2))
    print("\n| What | Value | Unit |\n|---|---:|---|")
    for row in rows:
        print(f"| {row['what']} | {row['value']:.4g} | {row['unit']} |")


def machine() -> dict[str, Any]:
    """Machine, versions and command."""
    return {
        "command": shlex.join(["python", *sys.argv]),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "load_1min": round(os.getloadavg()[0], 2),
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "numpy", "pillow", "tokenizers")},
    }


def cpu_name() -> str:
    """Name of the processor, if the system knows it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def mixed_lengths(count: int, seed: int = 0) -> Lengths:
    """Lengths as in a mixture: half text, a quarter questions about an image, the rest one to seven images."""
    rng = np.random.default_rng(seed)
    images = rng.choice([0, 1, 2, 3, 4, 5, 6, 7], count, p=[0.5, 0.29, *[0.035] * 6]).astype(np.int32)
    text = rng.lognormal(np.where(images == 0, 5.5, 4.5), 0.9)
    tokens = np.clip(text + (NUM_IMAGE_TOKENS + 2) * images, 8, MAX_LENGTH).astype(np.int32)
    return Lengths(tokens, images, np.minimum(images, 1), (text / 2).astype(np.int32))


def planner_of(lengths: Lengths, **fields: Any) -> BatchPlanner:
    """A planner for eight ranks."""
    values = {"seed": 0, "world_size": 8, "rows_per_batch": 2, "max_length": MAX_LENGTH, **fields}
    return BatchPlanner(lengths, **values)


def packing() -> list[dict[str, Any]]:
    """How full rows are, compared with padded batches."""
    lengths = mixed_lengths(100_000)
    plans = planner_of(lengths)
    real = lengths.tokens.sum()
    padded = {}
    for grouped in (False, True):
        flat = planner_of(lengths, packing=False, group_by_length=grouped, rows_per_batch=16).plan(0)
        longest = np.append(lengths.tokens, 0)[flat.slots].max(axis=2)
        padded[grouped] = real / (longest * (flat.slots >= 0).sum(axis=2)).sum()
    images = np.append(plans.rows(0).sum(lengths.images), 0)[plans.plan(0).slots].sum(axis=2)[:-1]
    return [
        row("tokens of a sample, mean", lengths.tokens.mean(), "tokens"),
        row("packed rows of 4096, 100,000 samples: full", 100 * plans.efficiency, "%"),
        row("samples in a row, mean", len(lengths) / plans.num_rows, "samples"),
        row("padded batches of 16: full", 100 * padded[False], "%"),
        row("padded batches of 16 grouped by length: full", 100 * padded[True], "%"),
        row("images of the busiest of 8 ranks / mean", (images.max(axis=1) / images.mean(axis=1)).mean(), "×"),
    ]


def planning() -> list[dict[str, Any]]:
    """Seconds to plan a million samples, and to look one batch up."""
    lengths = mixed_lengths(1_000_000)
    first = best(lambda: planner_of(lengths).plan(0))
    plans = planner_of(lengths)
    plans.plan(0)
    epochs = itertools.count(1)  # an epoch that is planned already costs nothing
    further = best(lambda: plans.plan(next(epochs)))
    plan = plans.plan(1)
    lookup = best(lambda: [plan.batch(3, step) for step in range(plan.steps // 2, plan.steps // 2 + 1000)])
    return [
        row("plan of 1,000,000 samples, first epoch", first, "s"),
        row("plan of 1,000,000 samples, further epochs", further, "s"),
        row("a batch by its number", lookup * 1e3, "µs"),
    ]


def loading(folder: Path, count: int) -> list[dict[str, Any]]:
    """Samples each second: lengths, one sample, and a loader of packed batches."""
    dataset = load_data(write_data(folder, count), make_processor())
    lengths = measure(dataset)
    one = best(lambda: [dataset[index] for index in range(32)]) / 32
    pixels = best(lambda: [pixels_alone(folder / f"{index}.jpg") for index in range(32)]) / 32
    rows = [
        row("lengths by tokenization, one process", count / best(lambda: measure(dataset)), "samples/s"),
        row("one sample with one image of 640×480", one * 1e3, "ms"),
        row("decoding and resizing of its JPEG alone", pixels * 1e3, "ms"),
        row("sample / decoding and resizing", one / pixels, "×"),
    ]
    batches = PlannedBatches(planner_of(lengths, world_size=1, rows_per_batch=1, max_length=1024), rank=0)
    for workers in (0, 1, 2):
        loader = DataLoader(
            PackedSamples(dataset),
            batch_sampler=batches,
            collate_fn=PackedCollator(dataset.processor.pad_token_id),
            num_workers=workers,
        )
        seconds = best(lambda loader=loader: [None for _ in loader], clock=time.perf_counter)
        rows.append(row(f"loader, {workers} worker(s), start of workers included", count / seconds, "samples/s"))
    return rows


def write_data(folder: Path, count: int) -> Path:
    """`count` questions, each about one image."""
    rng = np.random.default_rng(0)
    records = []
    for index in range(count):
        blocks = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        blocks.resize(PICTURE, Image.Resampling.BICUBIC).save(folder / f"{index}.jpg", quality=90)
        turns = [("human", "<image>\nWhat is in the picture?"), ("gpt", "Blocks of many colours. " * (1 + index % 9))]
        conversation = [{"from": speaker, "value": text} for speaker, text in turns]
        records.append({"id": str(index), "image": f"{index}.jpg", "conversations": conversation})
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def make_processor() -> MetaMorphProcessor:
    """The miniature's tokenizer, with pixels as for SigLIP-SO400M at 384."""
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    tokenizer = AutoTokenizer.from_pretrained(asset_path("mini-llama"), trust_remote_code=False)
    return MetaMorphProcessor(SiglipImageProcessorPil(size=size), tokenizer, num_image_tokens=NUM_IMAGE_TOKENS)


def pixels_alone(path: Path) -> torch.Tensor:
    """What every sample costs at least: the JPEG decoded, resized and normalised as SigLIP's processor does."""
    with Image.open(path) as image:
        small = image.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(small)).permute(2, 0, 1).float()
    return pixels.div_(127.5).sub_(1)


def indexing(folder: Path) -> list[dict[str, Any]]:
    """Megabytes of JSON Lines each second, on one core, from the page cache."""
    path = folder / "large.jsonl"
    line = json.dumps({"id": "x", "conversations": [{"from": "gpt", "value": "word " * 80}]}) + "\n"
    path.write_text(line * 400_000, encoding="utf-8")
    return [row("index of JSON Lines", path.stat().st_size / 1e6 / best(lambda: scan_lines(path)), "MB/s")]


def cached_index(folder: Path) -> list[dict[str, Any]]:
    """Time and memory of opening ten million lines whose index is saved; and the speed of the index of an array."""
    os.environ["METAMORPH_CACHE"] = str(folder / "cache")
    path = folder / "lines.jsonl"
    path.write_bytes(b'{"id": 1}\n' * 10_000_000)
    open_source(path)  # makes the index and saves it
    before = resident_megabytes()
    source = open_source(path)
    grown = resident_megabytes() - before
    assert len(source) == 10_000_000
    array = folder / "array.json"
    record = json.dumps({"id": "x", "conversations": [{"from": "gpt", "value": "word " * 80}]})
    array.write_text("[" + ",\n".join([record] * 40_000) + "]", encoding="utf-8")
    return [
        row("opening 10,000,000 indexed lines", 1e3 * best(lambda: open_source(path)), "ms"),
        row("  memory that it takes", grown, "MB"),
        row("index of a JSON array", array.stat().st_size / 1e6 / best(lambda: scan_array(array)), "MB/s"),
    ]


def resident_megabytes() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def attention() -> list[dict[str, Any]]:
    """What packed rows cost with SDPA: a small decoder on 32 samples of 64 and 4 of 1024 tokens."""
    config = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4
    )
    decoder = LlamaModel(config)
    rows = []
    for count, length in ((32, 64), (4, 1024)):
        ids = torch.randint(0, 512, (count, length))
        positions = torch.arange(length).repeat(1, count)
        mask = mask_of_samples(decoder, [[length] * count], ids.device)

        def padded(ids: torch.Tensor = ids) -> None:
            decoder(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)[0].sum().backward()

        def packed(ids: torch.Tensor = ids, positions: torch.Tensor = positions, mask: Any = mask) -> None:
            row = {"input_ids": ids.view(1, -1), "position_ids": positions, "attention_mask": mask}
            decoder(**row, use_cache=False)[0].sum().backward()

        what = f"{count} samples of {length} tokens: one packed row / padded batch, step time with SDPA"
        rows.append(row(what, best(packed) / best(padded), "×"))
    return rows


def row(what: str, value: float, unit: str) -> dict[str, Any]:
    """One line of the table."""
    return {"what": what, "value": float(value), "unit": unit}


def best(work: Callable[[], Any], repeats: int = 3, clock: Callable[[], float] = time.process_time) -> float:
    """Seconds of the fastest of several runs."""
    times = []
    for _ in range(repeats):
        start = clock()
        work()
        times.append(clock() - start)
    return min(times)


if __name__ == "__main__":
    main()
