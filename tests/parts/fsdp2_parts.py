"""FSDP2 on processes without GPUs."""

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from metamorph.training.arguments import sharding


def shard_on_cpu() -> None:
    """Let FSDP2 run on CPUs: Accelerate, which would silently use DDP, is told that the processes have GPUs."""
    original = AcceleratorState.__init__

    def init(self, *args, **kwargs):
        if PartialState._shared_state.get("distributed_type") == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        original(self, *args, **kwargs)

    AcceleratorState.__init__ = init
    sharding.check_has_gpus = lambda args: None
