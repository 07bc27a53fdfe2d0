"""One process of `test_observability_processes.py`: an observed run; the main process writes what it logged."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from training_parts import arguments

from metamorph.training.run import run_training


def main(parts: Path, output_dir: Path, flags: dict[str, Any]) -> None:
    """Train, and write `log.json`."""
    result = run_training(*arguments(parts, output_dir, stage=2, **flags))
    if result.is_main_process:
        assert os.environ["RANK"] == "0"
        (output_dir / "log.json").write_text(json.dumps(result.log_history))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
