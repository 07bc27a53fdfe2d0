"""Everything that needs a GPU, by one command: the tests marked `gpu` and benchmarks with the sizes of real models.

    make gpu                                    # or: python benchmarks/gpu.py --minutes 8

Each part is a process of at most 7 minutes. Finished parts are kept in `out/gpu`, so a call that was cut off, or that
`--minutes` has ended, is continued by the next one. Once all parts are there, their rows replace the section between
the marks in `benchmarks/RESULTS.md`. `--small` tries the whole program with tiny sizes, also on a CPU, and prints the
section instead.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch


ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "RESULTS.md"
BEGIN, END = "<!-- make gpu -->", "<!-- end of make gpu -->"
MOST_SECONDS = 420
"""Of one part."""


def main() -> None:
    """Run the parts that are missing, and write the section once all are there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop parts after this")
    parser.add_argument("--output", type=Path, help="folder of finished parts (default: out/gpu or out/gpu-small)")
    parser.add_argument("--small", action="store_true", help="tiny sizes, also on a CPU")
    parser.add_argument("--case", help=argparse.SUPPRESS)  # one benchmark, in a process of its own
    flags = parser.parse_args()
    if flags.case is not None:
        print(json.dumps(measure(flags.case, small=flags.small)))
        return
    if not (torch.cuda.is_available() or flags.small):
        sys.exit("make gpu needs a CUDA device, and there is none; --small tries the program without one")
    folder = flags.output or ROOT / "out" / ("gpu-small" if flags.small else "gpu")
    folder.mkdir(parents=True, exist_ok=True)
    start, missing = time.monotonic(), []
    for name, command in parts(small=flags.small).items():
        file = folder / f"{name}.json"
        if file.exists():
            print(f"{name}: done before", flush=True)
        elif (left := 60 * flags.minutes - (time.monotonic() - start)) < 60:
            missing.append(name)
        else:
            part = run(name, command, min(MOST_SECONDS, left))
            if part["status"] == "ok":
                file.write_text(json.dumps(part, indent=2) + "\n", encoding="utf-8")
            else:
                missing.append(name)
            print(f"{name}: {part['status']}, {part['seconds']} s", flush=True)
    if missing:
        sys.exit(f"not done: {', '.join(missing)}; call again to continue")
    text = section([json.loads((folder / f"{name}.json").read_text()) for name in parts(small=flags.small)])
    if flags.small:
        print(text)
        return
    before, _, rest = RESULTS.read_text(encoding="utf-8").partition(BEGIN)
    RESULTS.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    print(f"written to {RESULTS}")


def parts(*, small: bool) -> dict[str, list[str]]:
    """Name -> command of each part: one for each file with GPU tests, one for each case of the benchmarks."""
    from train_gpu import CASES
    from visualizer_gpu import DRAWING, TRAINING

    marked = [file for file in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in file.read_text()]
    pytest = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    found = {f"tests-{file.stem}": [*pytest, str(file.relative_to(ROOT))] for file in marked}
    counts = {"train": len(CASES), "visualizer": len(TRAINING), "drawing": len(DRAWING)}
    for kind, count in counts.items():
        for number in range(count):
            own = [sys.executable, str(Path(__file__).relative_to(ROOT)), "--case", f"{kind}-{number}"]
            found[f"{kind}-{number}"] = own + ["--small"] * small
    return found


def measure(name: str, *, small: bool) -> dict[str, Any]:
    """The row of one case; one that does not fit in the memory of the GPU has the result `out of memory`."""
    from dataclasses import replace

    import train_gpu
    import visualizer_gpu

    kind, _, number = name.partition("-")
    try:
        if kind == "train":
            return train_gpu.measure_case(replace(train_gpu.CASES[int(number)], small=small))
        if kind == "visualizer":
            return visualizer_gpu.training_case(*visualizer_gpu.TRAINING[int(number)], small=small)
        return visualizer_gpu.drawing_case(*visualizer_gpu.DRAWING[int(number)], small=small)
    except torch.OutOfMemoryError:
        return {"case": name, "result": "out of memory"}


def run(name: str, command: list[str], seconds: float) -> dict[str, Any]:
    """Run one part and keep the last line that it prints: the summary of pytest, or a row as JSON."""
    start = time.monotonic()
    paths = [str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds, check=False
        )
        status = "ok" if done.returncode == 0 else f"failed with exit code {done.returncode}"
        output = done.stdout
        if done.returncode != 0:
            print(done.stdout[-4000:], done.stderr[-4000:], sep="\n", file=sys.stderr)
    except subprocess.TimeoutExpired:
        status, output = f"stopped after {seconds:.0f} s", ""
    return {
        "part": name,
        "status": status,
        "seconds": round(time.monotonic() - start),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "torch": torch.__version__,
        "command": " ".join(["python", *command[1:]]),
        "result": (output.strip().splitlines() or [""])[-1],
    }


def section(found: list[dict[str, Any]]) -> str:
    """The section of the results as Markdown: the tests, and a table for each kind of benchmark."""
    first = found[0]
    lines = [f"{first['device']}, torch {first['torch']}, {first['date']}, by `make gpu`.", ""]
    lines += ["| command | result |", "|---|---|"]
    lines += [f"| `{part['command']}` | {part['result']} |" for part in found if part["part"].startswith("tests-")]
    for kind in ("train", "visualizer", "drawing"):
        rows = [json.loads(part["result"]) for part in found if part["part"].startswith(f"{kind}-")]
        columns = list(dict.fromkeys(column for row in rows for column in row))
        lines += ["", f"`python benchmarks/gpu.py --case {kind}-N`:", ""]
        lines += ["| " + " | ".join(["N", *columns]) + " |", "|" + "---|" * (len(columns) + 1)]
        for number, row in enumerate(rows):
            cells = (row.get(column, "") for column in columns)
            values = (f"{value:.4g}" if isinstance(value, float) else str(value) for value in cells)
            lines.append("| " + " | ".join([str(number), *values]) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
