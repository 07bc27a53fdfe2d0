"""The flags of `metamorph train --dry-run`, and those of training as a dry run reads them: much may be missing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metamorph.data.records import DataError
from metamorph.flags.checks import RemembersGiven
from metamorph.flags.recipes import parse_arguments
from metamorph.training.arguments import DataArguments, MetaMorphTrainingArguments, ModelArguments
from metamorph.training.arguments.sharding import check_deepspeed


NOT_GIVEN = "(not given)"
ENGINE_FLAGS = ("sharding", "fsdp", "fsdp_config", "deepspeed")


@dataclass
class DryRunArguments(RemembersGiven):
    """Flags of a dry run: what would be trained, how and with how much memory, from configurations alone."""

    dry_run: bool = False
    """Print the resolved configuration, what is trained, batch size, learning rate and the memory each GPU needs, and
    stop. No weights are read; the data, `output_dir` and stage 1's connector may be missing."""
    num_gpus: int | None = None
    """Only with `dry_run`: GPUs of each machine to plan for; by default those it is started on."""
    num_nodes: int | None = None
    """Only with `dry_run`: machines to plan for."""
    gpu_memory: float = 80.0
    """Only with `dry_run`: GiB of each GPU to plan for."""

    def __post_init__(self) -> None:
        for name in ("num_gpus", "num_nodes", "gpu_memory"):
            value = getattr(self, name)
            if self.is_given(name) and not self.dry_run:
                raise ValueError(
                    f"--{name} {value} is for --dry_run only: a run takes the processes that torchrun or accelerate "
                    "start and the GPUs that are there"
                )
            if value is not None and value <= 0:
                raise ValueError(f"--{name} {value} must be larger than 0")


@dataclass
class PreviewModelArguments(ModelArguments):
    """The model flags; neither weights nor a connector need to be there."""

    def __post_init__(self) -> None:
        connector = self.pretrain_mm_mlp_adapter
        self.missing_connector: str | None = None
        if connector is not None and not Path(connector).expanduser().exists():
            self.missing_connector, self.pretrain_mm_mlp_adapter = connector, None
        super().__post_init__()

    def require_connector(self, continues_metamorph: bool) -> None:
        """Accept stage 2 without a connector: its weights do not matter yet.

        Args:
            continues_metamorph: Ignored.
        """

    def _check_is_whole(self) -> None:
        """Weights are not read."""


@dataclass
class PreviewDataArguments(DataArguments):
    """The data flags; the data need not be there."""

    data_path: str = ""

    def __post_init__(self) -> None:
        self.missing_data: str | None = None
        try:
            super().__post_init__()
        except FileNotFoundError as error:
            self.missing_data = str(error) if self.data_path else "--data_path is not given"
        except DataError as error:
            if not isinstance(error.__cause__, FileNotFoundError):  # a source of a mixture
                raise
            self.missing_data = str(error)


@dataclass
class PreviewTrainingArguments(MetaMorphTrainingArguments):
    """The training flags; engines are planned for, not set up, so that GPUs need not be there."""

    output_dir: str | None = NOT_GIVEN

    def __post_init__(self) -> None:
        self.planned_engine = self._asked_engine()
        asked = {name: getattr(self, name) for name in ENGINE_FLAGS}
        self.sharding = "ddp"
        for name in ENGINE_FLAGS[1:]:
            setattr(self, name, None)
        super().__post_init__()
        for name, value in asked.items():
            setattr(self, name, value)

    def _check_device(self) -> None:
        """The run may be planned on a machine without a GPU."""

    def _asked_engine(self) -> str:
        if self.deepspeed:
            return _engine_of(self.deepspeed)
        return "fsdp2" if self.fsdp else self.sharding


def parse_training_flags(argv: Sequence[str], prog: str = "metamorph train") -> tuple[Any, Any, Any, DryRunArguments]:
    """Parse the command line of `metamorph train`, less strictly if it asks for a dry run.

    Args:
        argv: Command line without the program's name.
        prog: Name of the command in messages.

    Returns:
        Model, data and training flags (`Preview…` ones in a dry run), and those of the dry run.

    Raises:
        ValueError: for an unknown flag or key, or a bad value.
    """
    real = (ModelArguments, DataArguments, MetaMorphTrainingArguments, DryRunArguments)
    planned = (PreviewModelArguments, PreviewDataArguments, PreviewTrainingArguments, DryRunArguments)
    is_dry = any(word.startswith(("--dry-run", "--dry_run")) for word in argv)
    model_args, data_args, training_args, dry_run = parse_arguments(planned if is_dry else real, argv, prog=prog)
    if dry_run.dry_run == is_dry:
        return model_args, data_args, training_args, dry_run
    # The recipe says so, or the command line says `--dry_run False`.
    model_args, data_args, training_args, dry_run = parse_arguments(real if is_dry else planned, argv, prog=prog)
    return model_args, data_args, training_args, dry_run


def _engine_of(deepspeed: dict[str, Any] | str) -> str:
    """The engine that a DeepSpeed configuration describes."""
    if not isinstance(deepspeed, dict):
        try:
            deepspeed = json.loads(Path(deepspeed).expanduser().read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"--deepspeed {deepspeed} is not valid JSON: {error}") from error
    assert isinstance(deepspeed, dict)
    check_deepspeed(deepspeed)
    zero = deepspeed.get("zero_optimization", {})
    if zero.get("stage", 0) < 2:
        return "ddp"
    offload = "offload_optimizer" in zero or "offload_param" in zero
    return f"zero{zero['stage']}" + "_offload" * offload
