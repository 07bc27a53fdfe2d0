"""One process of `test_shards_processes.py`: FSDP2 runs whose checkpoints are written in the background."""

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from fsdp2_parts import shard_on_cpu
from preemption_parts import SignalIn
from torch.distributed.checkpoint import FileSystemWriter
from training_parts import arguments, logged

from metamorph.runs.checkpoint_files import CheckpointError
from metamorph.runs.preemption import Preempted
from metamorph.training import run
from metamorph.training.checkpoints import saving
from metamorph.training.trainer import MetaMorphTrainer


FLAGS: dict[str, Any] = {"sharding": "fsdp2", "save_strategy": "steps", "save_steps": 2, "max_steps": 6}
FLAGS |= {"per_device_train_batch_size": 1}
STAGES: dict[str, dict[str, Any]] = {"stage_1": {"stage": 1}, "stage_2": {"stage": 2, "from_scratch_connector": True}}
RANK = int(os.environ["RANK"])
FINISH, WRITE = FileSystemWriter.finish, FileSystemWriter.write_data
THIRD_STEP = threading.Event()


class Noting(MetaMorphTrainer):
    """Notes what is trained, and which checkpoints are in place when the third step begins."""

    def training_step(self, *args: Any) -> torch.Tensor:
        """As the trainer does."""
        trained = {name: weight.numel() for name, weight in self.plain_model.named_parameters() if weight.requires_grad}
        SEEN[f"stage_{self.stage}-trained"] = trained
        if self.state.global_step == 2 and not THIRD_STEP.is_set():
            SEEN["in_place"] = sorted(path.name for path in Path(self.args.output_dir).glob("checkpoint-*"))
            THIRD_STEP.set()
        loss: torch.Tensor = super().training_step(*args)
        return loss


class SignalAt(SignalIn):
    """Sends the signal when the step begins: these have one micro-batch."""

    on_step_begin = SignalIn.on_substep_end


SEEN: dict[str, Any] = {}
GATHERED: list[bool] = []


def gather_weights(*args: Any, **kwargs: Any) -> Any:
    """As the trainer does, and notes it."""
    GATHERED.append(True)
    return ORIGINAL(*args, **kwargs)


ORIGINAL = saving.gather_weights


def finish_after_third_step(self: Any, *args: Any, **kwargs: Any) -> None:
    """End the first checkpoint only when training has gone on."""
    if "checkpoint-2" in str(self.path) and not THIRD_STEP.wait(60):
        raise TimeoutError("training waits for the checkpoint")
    FINISH(self, *args, **kwargs)


def die(self: Any, *args: Any, **kwargs: Any) -> None:
    """End the process when all have written their parts of the second checkpoint."""
    if "checkpoint-4" in str(self.path):
        os.kill(os.getpid(), signal.SIGKILL)
    FINISH(self, *args, **kwargs)


def fail(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Run out of space on one process, in the last checkpoint: at the end, all processes wait for it."""
    if "checkpoint-6" in str(self.path) and RANK == 1:
        raise OSError(28, "No space left on device")
    return WRITE(self, *args, **kwargs)


def train(parts: Path, folder: Path, case: str, **kwargs: Any) -> Any:
    """Run a case in `folder`."""
    torch.manual_seed(0)
    return run.run_training(*arguments(parts, folder, **FLAGS, **STAGES[case]), **kwargs)


def main(parts: Path, folder: Path, kills: bool) -> None:
    """Be killed, or run everything else and write `rank-N.json`."""
    shard_on_cpu()
    run.MetaMorphTrainer = Noting  # type: ignore[misc]
    if kills:
        FileSystemWriter.finish = die
        train(parts, folder / "killed", "stage_2")
    FileSystemWriter.finish = finish_after_third_step
    result = train(parts, folder / "stage_2", "stage_2")
    FileSystemWriter.finish = FINISH
    SEEN["losses"] = logged(result)
    SEEN["resumed"] = logged(train(parts, folder / "killed", "stage_2"))
    saving.gather_weights = gather_weights
    for case in STAGES:
        try:
            train(parts, folder / f"preempted-{case}", case, callbacks=[SignalAt(3, signal.SIGUSR1)])
        except Preempted as error:
            SEEN[f"{case}-preempted"] = error.step
        SEEN[f"{case}-gathered"] = len(GATHERED)
    SEEN["stage_2-continued"] = logged(train(parts, folder / "preempted-stage_2", "stage_2"))
    FileSystemWriter.write_data = fail
    try:
        train(parts, folder / "full", "stage_2")
    except CheckpointError as error:
        SEEN["error"] = str(error)
    (folder / f"rank-{RANK}.json").write_text(json.dumps(SEEN))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), kills=len(sys.argv) > 3)
