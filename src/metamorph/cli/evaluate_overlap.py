"""`metamorph evaluate overlap --data_path DATA --specs SPEC=DATA`: benchmarks in training data."""

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from metamorph.cli.shared import print_table
from metamorph.flags.checks import errors_name_flag
from metamorph.flags.parser import at_least, output_file


_SHOWN = 5
"""Matches that are printed for each benchmark."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    parser.set_defaults(run=_run)
    parser.add_argument("--data_path", required=True, help="records, as for metamorph train")
    parser.add_argument("--image_folder", help="folder of relative media paths (default: the folder of the records)")
    specs_help = "benchmarks of `metamorph evaluate --list` or YAML files, and their data, such as mmvp=/data/MMVP"
    parser.add_argument("--specs", nargs="+", required=True, metavar="SPEC=DATA", help=specs_help)
    distance_help = "bits of 64 in which the perceptual hashes of similar images may differ; 0 wants them equal"
    parser.add_argument("--max_distance", type=at_least(0), default=4, help=distance_help)
    parser.add_argument(
        "--workers", type=at_least(0), default=min(os.cpu_count() or 1, 8), help="processes that read training data"
    )
    parser.add_argument("--output", type=output_file, help="JSON file of all matches")


def _run(flags: argparse.Namespace) -> None:
    from metamorph.data.dataset import load_data
    from metamorph.evaluation.benchmarks.spec import SpecChoice
    from metamorph.evaluation.overlap import find_overlap
    from metamorph.evaluation.samples import Sample

    benchmarks: dict[str, Sequence[Sample]] = {}
    for text in flags.specs:
        with errors_name_flag("--specs", text):
            choice = SpecChoice.parse(text)
            if choice.spec.name in benchmarks:
                raise ValueError(f"there are two benchmarks named {choice.spec.name}: give each its own run")
            benchmarks[choice.spec.name] = [sample for _, sample in choice.load()]
    data = load_data(flags.data_path, None, flags.image_folder, check=False, weighted=False)
    found = find_overlap(data, benchmarks, flags.max_distance, flags.workers)
    _print(found)
    if flags.output is not None:
        flags.output.parent.mkdir(parents=True, exist_ok=True)
        report = {"data_path": flags.data_path, "specs": flags.specs, **found}
        flags.output.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _print(found: Mapping[str, Any]) -> None:
    """Print a table of counts, then the first matches of each benchmark, images first."""
    from metamorph.evaluation.overlap import KINDS

    names = ("samples", *KINDS)
    rows = [(name, *(f"{of[key]:,}" for key in names)) for name, of in found["benchmarks"].items()]
    print_table(("benchmark", *(name.replace("_", " ") for name in names)), rows)
    for name, of in found["benchmarks"].items():
        matches = sorted(of["matches"], key=lambda match: KINDS.index(match["kind"]))
        for match in matches[:_SHOWN]:
            first, others = match["records"][0], match["count"] - 1
            more = f" and {others:,} more" if others else ""
            images = f" ({', '.join(first['images'])})" if first["images"] else ""
            print(f"{name} {match['sample']}: {match['kind'].replace('_', ' ')}, {first['record']}{images}{more}")
        if len(matches) > _SHOWN:
            print(f"{name}: {len(matches) - _SHOWN:,} further matches are in the file of --output")
    if unreadable := found["unreadable"]:
        print(f"{len(unreadable):,} of {found['records']:,} records cannot be read; the first: {unreadable[0]}")
