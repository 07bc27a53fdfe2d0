"""Trains for two steps in a separate process and prints, as JSON, the memory that took and its estimate."""

import gc
import json
import sys
from pathlib import Path

import torch
from training_parts import arguments, make_language_model, make_vision_tower

from metamorph.training.build import load_model, resolve_model
from metamorph.training.costs.memory import MicroBatch, estimate_memory
from metamorph.training.stages import apply_stage


LENGTH = 1024
SIZES = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 16384,
}
"""29 million parameters: large compared to what Python and the libraries allocate."""


def status(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


def main(folder: Path) -> None:
    make_language_model(folder / "llm", **SIZES)
    make_vision_tower(folder / "tower")
    (folder / "images").mkdir()
    (folder / "data.jsonl").write_text("")
    model_args, *_ = arguments(folder, folder / "out", stage=2, from_scratch_connector=True)
    gc.collect()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    model = load_model(model_args, resolve_model(model_args)).train()
    apply_stage(model, model_args)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], fused=True)
    ids = torch.randint(0, SIZES["vocab_size"] // 2, (1, LENGTH))
    for _ in range(2):  # the optimizer's state is there from the second on
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    estimate = estimate_memory(model, "single", MicroBatch(1, LENGTH, 0), bf16=False, on_gpu=False)
    sys.stdout.write(json.dumps({"measured": status("VmHWM") - before, "estimated": estimate.total}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
