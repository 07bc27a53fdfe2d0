"""One process of `test_fsdp2.py`: our model under FSDP2 as Accelerate shards it, a few steps, and a checkpoint.

The trainer cannot be used: on a CPU, Accelerate silently trains with DDP instead.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin, fsdp2_prepare_model
from fsdp2_parts import build, train
from safetensors.torch import save_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from training_parts import arguments

from metamorph.training.engines.prepare import configure_fsdp2, layer_classes
from metamorph.training.engines.weights import FrozenTower, gather_weights


def main(parts: Path, output_dir: Path, stage: int) -> None:
    """Train on this rank's batches; write losses, full weights and a distributed checkpoint."""
    model_args, _, args = arguments(parts, output_dir, stage=stage, from_scratch_connector=stage == 2)
    accelerator, is_main = Accelerator(cpu=True), os.environ["RANK"] == "0"
    model = build(model_args)
    configure_fsdp2(args, layer_classes(model))
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(**args.fsdp_plugin_args)
    tower = FrozenTower(model, dtype=None, device=torch.device("cpu"), outside=True, keep=is_main)
    model = fsdp2_prepare_model(accelerator, model)
    seen = {
        "layers": all(isinstance(layer, FSDPModule) for layer in model.get_decoder().layers),
        "sharded": all(isinstance(weight, DTensor) for weight in model.parameters()),
        "encoder": any(isinstance(weight, DTensor) for weight in model.model.vision_tower.encoder.parameters()),
    }
    losses = torch.stack(train(model, model_args, parts, int(os.environ["RANK"]), world_size=2))
    dist.all_reduce(losses)
    seen["losses"] = (losses / 2).tolist()
    dcp.save({"model": model.state_dict()}, checkpoint_id=output_dir / "checkpoint")
    state = gather_weights(model, keep=is_main) | tower.state_dict()
    if is_main:
        save_file({name: weight.contiguous() for name, weight in state.items()}, output_dir / "full.safetensors")
        (output_dir / "seen.json").write_text(json.dumps(seen))
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
