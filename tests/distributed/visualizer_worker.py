"""One process of `test_visualizer_processes.py`: trains with the flags in a JSON file and writes the losses."""

import json
import sys
from pathlib import Path

from metamorph.visualization import VisualizerArguments, train_visualizer


if __name__ == "__main__":
    args = VisualizerArguments(**json.loads(Path(sys.argv[1]).read_text()))
    result = train_visualizer(args)
    if result.is_main_process:
        (result.output_dir / "losses.json").write_text(json.dumps(result.losses))
