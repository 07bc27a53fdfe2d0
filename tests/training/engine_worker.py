"""One process of `test_engines_processes.py` and `test_fsdp2.py`: trains the runs in a JSON file one after another."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from fsdp2_parts import shard_on_cpu
from packing_parts import NUMBER
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from training_parts import arguments, logged

from metamorph.training import run
from metamorph.training.trainer import MetaMorphTrainer


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
        SEEN["partitioned"] = sum(is_partitioned(weight) for weight in self.plain_model.parameters())
        SEEN["tower_partitioned"] = any(is_partitioned(weight) for weight in tower.parameters())
        texts = [self.processing_class.tokenizer.decode(row) for batch in batches for row in batch["input_ids"]]
        SEEN["samples"] += [int(number) for text in texts for number in NUMBER.findall(text)]
        weights = list(self.plain_model.parameters())
        SEEN["meshes"] = [list(weight.device_mesh.shape) for weight in weights if isinstance(weight, DTensor)]
        SEEN["layers"] = all(isinstance(layer, FSDPModule) for layer in self.plain_model.get_decoder().layers)
        return batches, count

    def training_step(self, *args: Any) -> torch.Tensor:
        """As the trainer does; notes the bytes of gradients that stay unsharded after a micro-batch."""
        loss: torch.Tensor = super().training_step(*args)
        SEEN["unsharded"] = max(SEEN.get("unsharded", 0), unsharded_gradients(self.plain_model))
        return loss


SEEN: dict[str, Any] = {}


def unsharded_gradients(model: torch.nn.Module) -> int:
    """Bytes of gradients that FSDP2 keeps for all weights, not only for the shard of this process."""
    states = [module._get_fsdp_state() for module in model.modules() if isinstance(module, FSDPModule)]
    groups = [state._fsdp_param_group for state in states if state._fsdp_param_group is not None]
    weights = [weight for group in groups for weight in group.fsdp_params]
    kept = [weight.unsharded_accumulated_grad for weight in weights]  # if their precision is not that of the averages
    kept += [weight._unsharded_param.grad for weight in weights if hasattr(weight, "_unsharded_param")]
    return sum(gradient.nbytes for gradient in kept if gradient is not None)


def is_partitioned(weight: torch.Tensor) -> bool:
    """Whether this process has only a part of a weight, by ZeRO-3 or FSDP2."""
    return hasattr(weight, "ds_id") or isinstance(weight, DTensor)


def without_weights(parts: Path, flags: dict[str, Any], folder: Path) -> dict[str, str]:
    """Flags that name copies of the models in `flags` whose files of weights are empty."""
    copies = {}
    for flag, default in (("model_name_or_path", parts / "llm"), ("vision_tower", parts / "tower")):
        copy = folder / flag
        shutil.copytree(flags.get(flag, default), copy)
        for file in copy.glob("*.safetensors"):
            os.truncate(file, 0)
        copies[flag] = str(copy)
    return copies


def main(parts: Path, output_dir: Path) -> None:
    """Train every run of `runs.json`."""
    run.MetaMorphTrainer = Recording  # type: ignore[misc]
    runs = json.loads((output_dir / "runs.json").read_text())
    if any(flags["sharding"].startswith("zero") for flags in runs.values()):
        import deepspeed

        # DeepSpeed would compile a faster all-reduce for processes of one machine, which takes minutes.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    for name, flags in runs.items():
        if flags["sharding"] == "fsdp2" and flags["use_cpu"]:
            shard_on_cpu()
        if flags["sharding"] == "fsdp2" and os.environ["RANK"] != "0" and "resume_from_checkpoint" not in flags:
            flags |= without_weights(parts, flags, output_dir / f"{name}-without-weights-{os.environ['RANK']}")
        SEEN.clear()
        SEEN["steps"], SEEN["samples"] = [], []
        torch.manual_seed(0)
        result = run.run_training(*arguments(parts, output_dir / name, **flags))
        SEEN["losses"] = logged(result)
        SEEN["norms"] = logged(result, "grad_norm")
        SEEN["trained"] = result.global_step
        SEEN["eval_losses"] = [line["eval_loss"] for line in result.log_history if "eval_loss" in line]
        (output_dir / f"{name}-{os.environ['RANK']}.json").write_text(json.dumps(SEEN))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
