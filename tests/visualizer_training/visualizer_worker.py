"""One process of `test_processes.py`: trains with the flags in a JSON file and writes what it has seen."""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from fsdp2_parts import shard_on_cpu

from metamorph.visualization import VisualizerArguments, train_visualizer
from metamorph.visualizer_training.images.sources import TrainingImages
from metamorph.visualizer_training.trainer import VisualizerTrainer


def note_images(folder: Path) -> None:
    """Append the number of every image that is read to `images-RANK.txt`."""
    original = TrainingImages.load

    def load(self, index):
        with (folder / f"images-{os.environ.get('RANK', 0)}.txt").open("a") as file:
            file.write(f"{index}\n")
        return original(self, index)

    TrainingImages.load = load


def die_in_checkpoint(number: int) -> None:
    """Let the process end by SIGKILL when half of the optimizer of the given checkpoint is written."""
    original, done = torch.save, []

    def save(tensors, path):
        original(tensors, path)
        done.extend([path] if Path(path).name == "optimizer.pt" else [])
        if Path(path).name == "optimizer.pt" and len(done) == number:
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = save


if __name__ == "__main__":
    file = Path(sys.argv[1])
    if json.loads(file.read_text()).get("sharding") == "fsdp2":
        shard_on_cpu()
    note_images(file.parent)
    if len(sys.argv) > 2:
        die_in_checkpoint(int(sys.argv[2]))
    save_result = VisualizerTrainer.save_result

    def note_engine(self) -> None:
        file.with_name("is_sharded.json").write_text(json.dumps(self.is_sharded))
        save_result(self)

    VisualizerTrainer.save_result = note_engine
    result = train_visualizer(VisualizerArguments(**json.loads(file.read_text())))
    if result.is_main_process:
        (result.output_dir / "losses.json").write_text(json.dumps(result.losses))
