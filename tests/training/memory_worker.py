"""Trains for two steps in separate processes, and writes the memory that took and its estimate."""

import gc
import json
import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin, fsdp2_prepare_model
from training_parts import arguments

from metamorph.training.build import load_model, resolve_model
from metamorph.training.costs.memory import MicroBatch, estimate_memory
from metamorph.training.engines.prepare import configure_fsdp2, layer_classes
from metamorph.training.engines.weights import FrozenTower
from metamorph.training.stages import apply_stage


LENGTH = 1024


def status(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


def main(folder: Path, accumulation: int) -> None:
    """Train alone, or with FSDP2 if torchrun has started several processes, as the trainer does it."""
    rank, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    model_args, _, args = arguments(folder, folder / "out", stage=2, from_scratch_connector=True)
    accelerator = Accelerator(cpu=True)
    gc.collect()
    before = status("VmRSS")
    model = load_model(model_args, resolve_model(model_args)).train()
    apply_stage(model, model_args)
    engine = "single" if processes == 1 else "fsdp2"
    estimate = estimate_memory(
        model, engine, MicroBatch(1, LENGTH, 0), num_processes=processes, bf16=False, on_gpu=False
    )
    if engine == "fsdp2":
        configure_fsdp2(args, layer_classes(model))
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(**args.fsdp_plugin_args)
        FrozenTower(model, dtype=None, device=torch.device("cpu"), outside=True, keep=False)
        model = fsdp2_prepare_model(accelerator, model)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], fused=True)
    ids = torch.randint(0, 256, (1, LENGTH))  # none of the image tokens
    sync_each_batch = (args.accelerator_config.gradient_accumulation_kwargs or {}).get("sync_each_batch", False)
    for _ in range(2):  # the optimizer's state is there from the second on
        for number in range(accumulation):
            if engine == "fsdp2":
                model.set_requires_gradient_sync(sync_each_batch or number == accumulation - 1)
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if rank == 0:
        numbers = {"measured": status("VmHWM") - before, "estimated": estimate.total}
        (folder / "numbers.json").write_text(json.dumps(numbers))
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
