"""The quickstart with several seeds: its results, their spread, and the time it takes.

    python benchmarks/quickstart.py --seeds 0 1 2 --output-dir out-seeds

Every seed is one `metamorph quickstart`; a seed whose metrics.json exists is not run again. Prints a table
and writes `quickstart.json` with machine, versions and command.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any


ROWS: dict[str, tuple[str, ...]] = {
    "questions answered exactly": ("vqa", "accuracy"),
    "an image if and only if asked for one": ("image_start", "accuracy"),
    "one object, seen combination": ("generation", "seen", "all"),
    "one object, held-out combination": ("generation", "held_out", "all"),
    "two objects": ("generation", "pairs", "all"),
    "prompts that need a fact": ("generation", "knowledge", "all"),
    "edits": ("edit", "all"),
    "next frames": ("next_frame", "all"),
    "visualizer alone": ("visualizer", "all"),
    "minutes": ("seconds", "total"),
    "peak memory, MB": ("peak_rss_mb",),
}
"""Rows of the table, and where their values are in metrics.json."""


def read(metrics: dict[str, Any], keys: tuple[str, ...]) -> float:
    """The value at a place of metrics.json."""
    value: Any = metrics
    for key in keys:
        value = value[key]
    return value / 60 if keys == ("seconds", "total") else value


def table(metrics: dict[int, dict[str, Any]]) -> list[list[str]]:
    """One row per figure: each seed's value, the mean and the spread (largest minus smallest)."""
    rows = {name: [read(run, keys) for run in metrics.values()] for name, keys in ROWS.items()}
    kinds = sorted(next(iter(metrics.values()))["vqa"]["per_type"])
    rows |= {f"questions: {kind}": [run["vqa"]["per_type"][kind] for run in metrics.values()] for kind in kinds}
    lines = []
    for name, values in rows.items():
        form = "{:.0f}" if "MB" in name else "{:.1f}" if name == "minutes" else "{:.1%}"
        shown = [*values, sum(values) / len(values), max(values) - min(values)]
        lines.append([name, *(form.format(value) for value in shown)])
    return lines


def main() -> None:
    """Run, tabulate, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output-dir", type=Path, default=Path("out-seeds"))
    options = parser.parse_args()
    metrics = {}
    for seed in options.seeds:
        folder = options.output_dir / f"seed-{seed}"
        if not (folder / "metrics.json").is_file():
            command = [
                sys.executable,
                "-m",
                "metamorph",
                "quickstart",
                "--seed",
                str(seed),
                "--output-dir",
                str(folder),
            ]
            subprocess.run(command, check=True)
        metrics[seed] = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    rows = table(metrics)
    header = ["", *(f"seed {seed}" for seed in metrics), "mean", "spread"]
    for line in [header, ["---"] * len(header), *rows]:
        print("| " + " | ".join(line) + " |")
    first = next(iter(metrics.values()))
    facts = {
        "command": " ".join(sys.argv),
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "threads": first["threads"],
        "versions": first["versions"],
        "metrics": metrics,
    }
    (options.output_dir / "quickstart.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
