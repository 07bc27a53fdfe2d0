"""One process of `test_batch_plan_processes.py`: a run, and the same run killed and resumed; writes what it saw."""

import json
import os
import sys
from contextlib import suppress
from pathlib import Path

from packing_parts import TWO_EPOCHS, KillAfter, Killed, recorded
from training_parts import arguments, logged

from metamorph.training.run import run_training


def main(parts: Path, output_dir: Path) -> None:
    """Train three times and write `rank-N.json`."""
    with recorded() as uninterrupted:
        result = run_training(*arguments(parts, output_dir / "uninterrupted", stage=2, **TWO_EPOCHS))
    with recorded() as first, suppress(Killed):
        run_training(*arguments(parts, output_dir / "cut", stage=2, **TWO_EPOCHS), callbacks=[KillAfter(2)])
    with recorded() as rest:
        run_training(*arguments(parts, output_dir / "cut", stage=2, **TWO_EPOCHS, dataloader_num_workers=1))
    losses = logged(result)
    seen = {"uninterrupted": uninterrupted, "first": first, "rest": rest, "losses": losses}
    (output_dir / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
