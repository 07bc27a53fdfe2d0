"""One process of `test_fsdp2_gpu.py`: trains with `--sharding fsdp2` and with DDP, and writes what it saw."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from training_parts import arguments, logged

from metamorph.training import run
from metamorph.training.trainer import MetaMorphTrainer


class Recording(MetaMorphTrainer):
    """Notes what the model has become."""

    def get_batch_samples(self, *args: Any) -> Any:
        """As the trainer does."""
        model, tower = self.plain_model, self.plain_model.model.vision_tower
        SEEN["model"] = isinstance(self.model_wrapped, FSDPModule)
        SEEN["layers"] = all(isinstance(layer, FSDPModule) for layer in model.get_decoder().layers)
        SEEN["sharded"] = all(isinstance(weight, DTensor) for weight in model.parameters())
        SEEN["float32"] = all(weight.dtype == torch.float32 for weight in model.parameters())
        SEEN["tower_sharded"] = any(isinstance(weight, DTensor) for weight in tower.parameters())
        SEEN["tower_dtype"] = str(tower.encoder.dtype)
        return super().get_batch_samples(*args)


SEEN: dict[str, Any] = {}


def main(parts: Path, output_dir: Path) -> None:
    """Train with DDP, with FSDP2, and from the middle of the FSDP2 run again."""
    run.MetaMorphTrainer = Recording  # type: ignore[misc]
    flags = {"stage": 2, "from_scratch_connector": True, "bf16": True, "use_cpu": False, "max_steps": 10}
    flags |= {"per_device_train_batch_size": 1, "save_strategy": "steps", "save_steps": 6}
    runs: dict[str, dict[str, Any]] = {"ddp": {"sharding": "ddp"}, "fsdp2": {"sharding": "fsdp2"}}
    runs["resumed"] = runs["fsdp2"] | {"resume_from_checkpoint": str(output_dir / "fsdp2" / "checkpoint-6")}
    for name, own in runs.items():
        SEEN.clear()
        result = run.run_training(*arguments(parts, output_dir / name, **flags, **own))
        SEEN["losses"] = logged(result)
        if os.environ["RANK"] == "0":
            (output_dir / f"{name}.json").write_text(json.dumps(SEEN))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
