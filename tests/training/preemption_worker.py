"""One process of `test_preemption_processes.py`: runs, and runs that a signal to one process interrupts."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from packing_parts import recorded
from preemption_parts import CASES, FLAGS, SignalIn
from training_parts import arguments, logged

from metamorph.runs.checkpoint_files import CheckpointError
from metamorph.runs.lock import only_run_in
from metamorph.runs.preemption import MARKER_FILE, PREEMPTED, Preempted
from metamorph.training.run import run_training


def run_case(parts: Path, folder: Path, flags: dict[str, Any]) -> dict[str, Any]:
    """An uninterrupted run, and one that is interrupted in its third step and resumed."""
    with recorded() as uninterrupted:
        result = run_training(*arguments(parts, folder / "uninterrupted", **FLAGS, **flags))
    status, marker = None, folder / "cut" / MARKER_FILE
    with recorded() as first:
        try:
            run_training(*arguments(parts, folder / "cut", **FLAGS, **flags), callbacks=[SignalIn(3, signal.SIGUSR1)])
        except Preempted as error:
            status = error.code
    seen = {"uninterrupted": uninterrupted, "first": first, "losses": logged(result), "status": status}
    seen["marker"] = json.loads(marker.read_text())
    dist.barrier()  # the next run removes it
    with recorded() as seen["rest"]:
        resumed = run_training(*arguments(parts, folder / "cut", **FLAGS, **flags))
    assert not marker.exists()
    weights = result.model.state_dict()
    difference = max((value - weights[name]).abs().max().item() for name, value in resumed.model.state_dict().items())
    return {**seen, "resumed_losses": logged(resumed), "difference": difference}


def restartable(parts: Path, name: str) -> None:
    """A run that gets the signal `name` on one process in its third step, unless torchrun has restarted it."""
    start, rank = os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]
    (parts / f"{name}-start-{start}-{rank}").touch()
    flags = FLAGS | CASES["stage1"] | {"save_strategy": "steps", "save_steps": 2}
    callbacks = [SignalIn(3, signal.Signals[name])] if start == "0" else []
    with recorded() as steps:
        result = run_training(*arguments(parts, parts / name, **flags), callbacks=callbacks)
    (parts / f"{name}-{rank}.json").write_text(json.dumps({"steps": steps, "losses": logged(result)}))


def main(parts: Path) -> None:
    """Run all cases and write `rank-N.json`."""
    seen = {name: run_case(parts, parts / name, flags) for name, flags in CASES.items()}
    (parts / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(seen))
    with only_run_in(parts / "held"):
        try:
            run_training(*arguments(parts, parts / "held", **FLAGS, **next(iter(CASES.values()))))
        except CheckpointError as error:
            (parts / f"refused-{os.environ['RANK']}.txt").write_text(str(error))
    # As a preempted process of the command ends.
    raise SystemExit(PREEMPTED)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        restartable(Path(sys.argv[1]), sys.argv[2])
    else:
        main(Path(sys.argv[1]))
