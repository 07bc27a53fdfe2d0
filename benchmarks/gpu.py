"""Runs everything that needs a GPU: the tests marked `gpu`, and benchmarks with the sizes of real models.

    make gpu                                    # or: python benchmarks/gpu.py --minutes 8

Each part is a process of at most 7 minutes. Results are kept in `out/gpu.json`, so the next call continues one that was
cut off or that `--minutes` ended. Parts that failed, or that ran with other code, libraries or another GPU, run again.
The rows replace the section between the marks in `benchmarks/RESULTS.md`. `--small` tries the program with tiny sizes,
also on a CPU, and only prints the section.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch


ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "RESULTS.md"
BEGIN, END = "<!-- make gpu -->", "<!-- end of make gpu -->"
KINDS = ("tests", "train", "visualizer", "drawing")
"""Kinds of parts; each has a table."""
PART_SECONDS = 420
"""Limit of one part."""
LEAST_SECONDS = 60
"""With less time than this left of `--minutes`, no part is started."""


def main() -> None:
    """Run the parts that are missing, and write the section. Exits with an error if parts are still missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after this time")
    parser.add_argument("--output", type=Path, help="file of results (default: out/gpu.json or out/gpu-small.json)")
    parser.add_argument("--small", action="store_true", help="tiny sizes, also on a CPU")
    parser.add_argument("--case", help=argparse.SUPPRESS)  # one benchmark, in a process of its own
    flags = parser.parse_args()
    if flags.case is not None:
        print(json.dumps(measure(flags.case, small=flags.small)))
        return
    if not (torch.cuda.is_available() or flags.small):
        sys.exit("make gpu needs a CUDA device, and there is none; --small tries the program without one")
    file = flags.output or ROOT / "out" / ("gpu-small.json" if flags.small else "gpu.json")
    commands = parts(small=flags.small)
    found = run_parts(commands, file, 60 * flags.minutes)
    text = section({name: found[name] for name in commands if name in found})
    print(text)
    if found and not flags.small:
        before, _, rest = RESULTS.read_text(encoding="utf-8").partition(BEGIN)
        RESULTS.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    if missing := [name for name in commands if name not in found or found[name]["status"] != "ok"]:
        sys.exit(f"not done: {', '.join(missing)}; call again to continue")


def parts(*, small: bool) -> dict[str, list[str]]:
    """Name -> command of each part: one for each file with GPU tests, one for each case of the benchmarks."""
    from train_gpu import CASES
    from visualizer_gpu import DRAWING, TRAINING

    marked = [file for file in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in file.read_text()]
    pytest = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    names = [file.relative_to(ROOT).as_posix() for file in marked]
    commands = {name: [*pytest, name] for name in names}
    for kind, count in zip(KINDS[1:], (len(CASES), len(TRAINING), len(DRAWING)), strict=True):
        for number in range(count):
            own = [sys.executable, str(Path(__file__).relative_to(ROOT)), "--case", f"{kind}-{number}"]
            commands[f"{kind}-{number}"] = own + ["--small"] * small
    return commands


def measure(name: str, *, small: bool) -> dict[str, Any]:
    """The row of one case; one that does not fit in the memory of the GPU has the result `out of memory`."""
    from dataclasses import replace

    import train_gpu
    import visualizer_gpu

    kind, _, number = name.partition("-")
    if kind == "train":
        case = replace(train_gpu.CASES[int(number)], small=small)
        row, call = train_gpu.describe(case), lambda: train_gpu.measure_case(case)
    else:
        cases = visualizer_gpu.TRAINING if kind == "visualizer" else visualizer_gpu.DRAWING
        measure_case = visualizer_gpu.training_case if kind == "visualizer" else visualizer_gpu.drawing_case
        images, compiled = cases[int(number)]
        row = {"images": images, "compiled": compiled}
        call = lambda: measure_case(images, compiled, small=small)  # noqa: E731
    try:
        return row | call()
    except torch.OutOfMemoryError:
        return row | {"result": "out of memory"}


def run_parts(commands: dict[str, list[str]], file: Path, seconds: float) -> dict[str, dict[str, Any]]:
    """Run the parts that `file` lacks, for at most `seconds`, and keep each in it.

    Returns the parts of this environment by name. The status of one that failed or took too long is not `ok`.
    """
    here, end = environment(), time.monotonic() + seconds
    kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    found = {name: part for name, part in kept.items() if here.items() <= part.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    for name, command in commands.items():
        if name in found and found[name]["status"] == "ok":
            print(f"{name}: done before", flush=True)
        elif (left := end - time.monotonic()) >= LEAST_SECONDS:
            part = found[name] = here | run(command, min(PART_SECONDS, left))
            unfinished = file.with_suffix(".part")
            unfinished.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
            unfinished.replace(file)  # a call that is cut off here leaves what was there
            print(f"{name}: {part['status']}, {part['seconds']} s", flush=True)
    return found


def environment() -> dict[str, str]:
    """What a result depends on: the GPU, the versions, and the code.

    The code is told by a hash of its files, because a commit says nothing about edits, and copied trees have none.
    """
    code = hashlib.sha256()
    for file in sorted(file for folder in ("benchmarks", "src", "tests") for file in (ROOT / folder).rglob("*.py")):
        code.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes())
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "torch": torch.__version__,
        "transformers": metadata.version("transformers"),
        "diffusers": metadata.version("diffusers"),
        "code": code.hexdigest()[:12],
    }


def run(command: list[str], seconds: float) -> dict[str, Any]:
    """Run one part and keep the last line that it prints: the summary of pytest, or a row as JSON."""
    start = time.monotonic()
    paths = [str(ROOT / "src"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        output, errors = process.communicate(timeout=seconds)
        status = "ok" if process.returncode == 0 else f"failed with exit code {process.returncode}"
    except subprocess.TimeoutExpired:
        started = psutil.Process(process.pid).children(recursive=True)  # they hold memory of the GPU, too
        for each in (process, *started):
            each.kill()
        output, errors = process.communicate()
        status = f"stopped after {seconds:.0f} s"
    if status != "ok":
        print(output[-4000:], errors[-4000:], sep="\n", file=sys.stderr)
    return {
        "status": status,
        "seconds": round(time.monotonic() - start),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "command": " ".join(["python", *command[1:]]),
        "result": (output.strip().splitlines() or [""])[-1],
    }


def section(found: dict[str, dict[str, Any]]) -> str:
    """The section of the results as Markdown: a table for each kind of part."""
    if not found:
        return "No part has run."
    first = next(iter(found.values()))
    versions = ", ".join(f"{name} {first[name]}" for name in ("torch", "transformers", "diffusers", "code"))
    lines = [f"{first['device']}, {versions}, by `make gpu`."]
    for kind in KINDS:
        rows = [cells(part) for name, part in found.items() if name.startswith(kind)]
        columns = list(dict.fromkeys(column for row in rows for column in row))
        if rows:
            lines += ["", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        for row in rows:
            values = [row.get(column, "") for column in columns]
            values = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in values]
            lines.append("| " + " | ".join(values) + " |")
    return "\n".join(lines) + "\n"


def cells(part: dict[str, Any]) -> dict[str, Any]:
    """The cells of a part, by column."""
    is_ok, result = part["status"] == "ok", part["result"]
    if is_ok and result.startswith("{"):
        measured = json.loads(result)
    else:
        measured = {"result": result if is_ok else f"{part['status']}: {result}"}
    return {"command": f"`{part['command']}`", "date": part["date"], **measured}


if __name__ == "__main__":
    main()
