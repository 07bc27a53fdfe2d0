"""What each process holds of a sharded model, written while training continues, and read by any number of processes.

FSDP2 writes `SHARDS_FOLDER` in a checkpoint by `torch.distributed.checkpoint`: every trained weight and the optimizer's
state once, no frozen weight. DeepSpeed writes files of its own, also without frozen weights.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


logger = logging.getLogger(__name__)

SHARDS_FOLDER = "shards"
DEEPSPEED_FILE = "latest"
"""The file by which DeepSpeed finds its own in a checkpoint."""


class ShardWriter:
    """Writes the state of a sharded model, one checkpoint at a time. Every process must call its methods.

    Training waits until the state is copied to main memory (pinned with CUDA, and kept for the next checkpoint); a
    thread writes it. Without gloo, by which the threads of the processes talk to each other, and for states that cannot
    be copied, such as torchao's 8-bit ones, training waits for all.
    """

    def __init__(self, timeout: timedelta) -> None:
        self.timeout = timeout
        self._group: dist.ProcessGroup | None = None
        self._stager: DefaultStager | None = None
        self._writing: Future[Any] | None = None

    def start(self, state: dict[str, Any], folder: Path) -> None:
        """Copy `state`, and begin to write it to `folder`. The checkpoint before must be finished."""
        if not (dist.is_gloo_available() and _can_be_copied(state)):
            logger.info("training waits while a checkpoint is written: no gloo, or a state of the optimizer's own type")
            with _own_errors():
                dcp.save(state, checkpoint_id=folder)
            return
        if self._stager is None:
            logger.info("checkpoints are written while training continues")
            # Collectives of the main thread must not come between those of the writer.
            self._group = dist.new_group(backend="gloo", timeout=self.timeout)
            with_cuda = torch.cuda.is_available()
            # Pinned memory, shared memory, staging in a thread, non-blocking copies: the last has two names in PyTorch.
            self._stager = DefaultStager(StagingOptions(with_cuda, False, False, with_cuda))
        writing = dcp.async_save(state, checkpoint_id=folder, process_group=self._group, async_stager=self._stager)
        assert isinstance(writing, Future)  # staging is not asynchronous
        self._writing = writing

    @property
    def is_done(self) -> bool:
        """Whether all processes have written their parts, as far as this process knows."""
        return self._writing is None or self._writing.done()

    def wait(self) -> None:
        """Wait until all processes have written their parts; raises the error of the first one that has failed."""
        if self._writing is not None:
            with _own_errors():
                self._writing.result()
            self._writing = None


def training_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The trained weights and the optimizer's state, as this process holds them."""
    return {"model": _trained_weights(model), "optimizer": get_optimizer_state_dict(model, optimizer)}


def has_shards(folder: str | Path) -> bool:
    """Whether a checkpoint is one of FSDP2, with shards that any number of processes can read."""
    return (Path(folder) / SHARDS_FOLDER).is_dir()


def is_deepspeed(folder: str | Path) -> bool:
    """Whether a checkpoint is one of DeepSpeed."""
    return (Path(folder) / DEEPSPEED_FILE).is_file()


def load_weights_of_shards(model: nn.Module, folder: str | Path) -> None:
    """Load the trained weights of a checkpoint of FSDP2 or DeepSpeed; FSDP2's also into a model that is sharded."""
    if has_shards(folder):
        # In place. Before an engine has sharded the model, only the first process may have weights to load.
        state, alone = {"model": _trained_weights(model)}, not isinstance(model, FSDPModule)
        with _own_errors():
            dcp.load(state, checkpoint_id=Path(folder) / SHARDS_FOLDER, no_dist=alone)
        return
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    weights = get_fp32_state_dict_from_zero_checkpoint(str(folder), exclude_frozen_parameters=True)
    for name, weight in _trained_weights(model).items():  # the file also has buffers, and both names of tied weights
        weight.copy_(weights[name])


def load_optimizer_of_shards(model: nn.Module, optimizer: torch.optim.Optimizer, folder: str | Path) -> None:
    """Load the optimizer's state of a checkpoint of FSDP2 on any number of processes, sharded or not."""
    state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    with _own_errors():
        dcp.load(state, checkpoint_id=Path(folder) / SHARDS_FOLDER)
    set_optimizer_state_dict(model, optimizer, state["optimizer"])


def _can_be_copied(state: dict[str, Any]) -> bool:
    values = [value for states in state["optimizer"]["state"].values() for value in states.values()]
    local = [value.to_local() if isinstance(value, DTensor) else value for value in values]
    return all(type(value) is torch.Tensor for value in local if isinstance(value, torch.Tensor))


def _trained_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    # FSDP2 leaves some modules unsharded after a forward pass without a backward one; `state_dict` shards them again.
    state = model.state_dict()
    return {name: state[name].detach() for name, weight in model.named_parameters() if weight.requires_grad}


@contextmanager
def _own_errors() -> Iterator[None]:
    """Raise the error of the first process that failed: PyTorch's wrapper of all of them is not even an Exception."""
    try:
        yield
    except CheckpointException as error:
        raise error.failures[min(error.failures)][0] from error
