"""One process of `test_engines.py`: trains the runs in a JSON file, one after another, and writes what it saw."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from training_parts import arguments, logged

from metamorph.training import run
from metamorph.training.trainer import MetaMorphTrainer


# DeepSpeed would compile a faster all-reduce for processes of one machine, which takes minutes.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class Recording(MetaMorphTrainer):
    """Notes of every step whether this rank had images and answer images, and what kind of engine trained."""

    def get_batch_samples(self, *args: Any) -> Any:
        """As the trainer does."""
        batches, count = super().get_batch_samples(*args)
        images = any("pixel_values" in batch for batch in batches)
        SEEN["steps"].append([images, any(bool(batch["visual_target_mask"].any()) for batch in batches)])
        tower = self.plain_model.model.vision_tower
        SEEN["engine"] = type(self.model_wrapped).__name__
        SEEN["outside"] = "vision_tower" not in dict(self.plain_model.model.named_children())
        SEEN["partitioned"] = sum(hasattr(weight, "ds_id") for weight in self.plain_model.parameters())
        SEEN["tower_partitioned"] = any(hasattr(weight, "ds_id") for weight in tower.parameters())
        return batches, count


SEEN: dict[str, Any] = {}


def main(parts: Path, output_dir: Path) -> None:
    """Train every run of `runs.json`."""
    run.MetaMorphTrainer = Recording  # type: ignore[misc]
    for name, flags in json.loads((output_dir / "runs.json").read_text()).items():
        SEEN.clear()
        SEEN["steps"] = []
        torch.manual_seed(0)
        result = run.run_training(*arguments(parts, output_dir / name, **flags))
        SEEN["losses"] = logged(result)
        SEEN["norms"] = logged(result, "grad_norm")
        SEEN["trained"] = result.global_step
        (output_dir / f"{name}-{os.environ['RANK']}.json").write_text(json.dumps(SEEN))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
