"""The flags of `metamorph train --dry-run`."""

from __future__ import annotations

from dataclasses import dataclass

from metamorph.flags.checks import RemembersGiven


@dataclass
class DryRunArguments(RemembersGiven):
    """Whether to describe the run instead of training, and the GPUs to plan for."""

    dry_run: bool = False
    """Print the resolved configuration, what is trained, batch size, learning rate and the memory each GPU needs, and
    stop. No weights are read; the data, `output_dir` and stage 1's connector may be missing."""
    num_gpus: int | None = None
    """Only with `dry_run`: GPUs per machine to plan for; defaults to those of this launch."""
    num_nodes: int | None = None
    """Only with `dry_run`: machines to plan for."""
    gpu_memory: float = 80.0
    """Only with `dry_run`: GiB of each GPU to plan for."""

    def __post_init__(self) -> None:
        for name in ("num_gpus", "num_nodes", "gpu_memory"):
            value = getattr(self, name)
            if self.is_given(name) and not self.dry_run:
                raise ValueError(
                    f"--{name} {value} is for --dry_run only: a run uses the processes that torchrun or accelerate "
                    "start and the GPUs of this machine"
                )
            if value is not None and value <= 0:
                raise ValueError(f"--{name} {value} must be larger than 0")
