"""Saves and loads with any engine: atomic checkpoints, in shards if the model is sharded, and plain results."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer
from transformers.integrations.deepspeed import deepspeed_load_checkpoint
from transformers.trainer import SCHEDULER_NAME

from metamorph.runs.checkpoint_files import (
    PARTIAL_FOLDER,
    PREFIX,
    begin_checkpoint,
    commit_checkpoint,
    delete_old,
    explains_write_errors,
    flush,
)
from metamorph.runs.lock import check_lock
from metamorph.training.checkpoints.shards import (
    SHARDS_FOLDER,
    ShardWriter,
    has_shards,
    is_deepspeed,
    load_optimizer_of_shards,
    load_weights_of_shards,
    training_state,
)
from metamorph.training.checkpoints.weights import ARGUMENTS_FILE, TRAINER_STATE_FILE
from metamorph.training.engines.weights import gather_weights
from metamorph.training.reporting.monitor import RunMonitor


logger = logging.getLogger(__name__)


class SavingTrainer(Trainer):
    """`transformers.Trainer` whose checkpoints are complete or absent, and whose results are the same with any engine.

    A checkpoint of a sharded model holds each trained weight and the optimizer's state once, as the engine has divided
    them: nothing is gathered. FSDP2 writes it while training continues; it is put in place before a later step, or at
    the end.
    """

    plain_model: Any
    """The model without the wrapper of an engine."""
    monitor: RunMonitor
    flags: dict[str, Any] | None = None
    """Flags that checkpoints record."""
    _saving = False
    _unfinished: tuple[str, dict[str, Any]] | None = None
    """Name and metadata of a checkpoint that is not in place yet."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.plain_model = self.model  # FSDP2 and torch.compile may replace `self.model`
        self._shards = ShardWriter(self.args.ddp_timeout_delta)

    # Defined by subclasses.

    def checkpoint_metadata(self) -> dict[str, Any]:
        """What resuming needs besides the step and the flags, as JSON values."""
        raise NotImplementedError

    def write_weights(self, folder: Path, state_dict: dict[str, Tensor] | None) -> None:
        """Write the result to `folder`; without a `state_dict` all but its weights. Called on processes that save."""
        raise NotImplementedError

    def read_weights(self, folder: str) -> None:
        """Load what `write_weights` has written into the model, before an engine shards it."""
        raise NotImplementedError

    # Weights.

    @property
    def is_sharded(self) -> bool:
        """Whether an engine holds the weights of the model: divided among processes, or DeepSpeed's."""
        if self.is_deepspeed_enabled:
            return self.model_wrapped is not self.plain_model
        return isinstance(self.plain_model, FSDPModule)

    @property
    def saves_shards(self) -> bool:
        """Whether checkpoints hold what each process has of the model, instead of the result of `write_weights`."""
        return self.is_sharded and not self.args.save_only_model

    def full_state_dict(self) -> dict[str, Tensor]:
        """The full weights. Every process must call it; only those that save get them."""
        if self.is_sharded:
            return gather_weights(self.plain_model, keep=self.args.should_save)
        return self.plain_model.state_dict()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the result, in the same format with any engine. Every process must call it.

        For some engines, Trainer would write shards only, or weights in bfloat16.
        """
        in_shards = self._saving and self.saves_shards
        self._save(output_dir or self.args.output_dir, state_dict=None if in_shards else self.full_state_dict())
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.write_weights(folder, state_dict)
        arguments = json.dumps(self.args.to_sanitized_dict(), indent=2, default=str)
        (folder / ARGUMENTS_FILE).write_text(arguments + "\n", encoding="utf-8")

    # Loading.

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """As Trainer does, which demands of DeepSpeed's checkpoints the frozen weights that they lack."""
        if resume_from_checkpoint is None or not self.is_deepspeed_enabled:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self._load_from_checkpoint(resume_from_checkpoint)
        self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = resume_from_checkpoint
        if self.is_deepspeed_enabled and self.is_sharded:
            deepspeed_load_checkpoint(self.model_wrapped, folder, load_module_strict=False)
        elif has_shards(folder) or is_deepspeed(folder):
            load_weights_of_shards(self.plain_model, folder)
        else:
            self.read_weights(folder)

    def _load_best_model(self) -> None:
        """Trainer only loads full models and PEFT's adapters, but no connectors, alone or next to an adapter."""
        assert self.state.best_model_checkpoint is not None
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def load_optimizer(self, checkpoint: str | None) -> None:
        """Load the states of optimizer and scheduler."""
        if checkpoint is None or not has_shards(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        load_optimizer_of_shards(self.plain_model, self.optimizer, checkpoint)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint, SCHEDULER_NAME), weights_only=True))

    # Checkpoints.

    def _get_output_dir(self, trial: Any) -> str:
        """While a checkpoint is being written, the folder of incomplete ones."""
        folder = super()._get_output_dir(trial)
        return str(Path(folder) / PARTIAL_FOLDER) if self._saving else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save as Trainer does, but atomically: write to another folder, and rename it when it is complete.

        No callback runs before it, so the counters are updated and the clock is stopped here. If it cannot be written,
        the last good one still exists.
        """
        self.finish_checkpoint()  # the one before
        self.monitor.sync(self.state)
        output_dir, name = self._get_output_dir(trial), f"{PREFIX}{self.state.global_step}"
        with self.monitor.pause(), explains_write_errors(output_dir, name):
            if self.args.should_save:
                check_lock(output_dir)
                begin_checkpoint(output_dir)
            self.accelerator.wait_for_everyone()
            self._saving = True
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._saving = False
            partial, final = Path(output_dir) / PARTIAL_FOLDER / name, Path(output_dir) / name
            if self.state.best_model_checkpoint == str(partial):  # noted by Trainer on all processes
                self.state.best_model_checkpoint = str(final)
                if self.args.should_save:
                    self.state.save_to_json(str(partial / TRAINER_STATE_FILE))
            if self.args.local_process_index == 0:
                flush(output_dir)
            self.accelerator.wait_for_everyone()
            metadata = {"step": self.state.global_step, "in_shards": self.saves_shards, **self.checkpoint_metadata()}
            self._unfinished = name, {**metadata, "flags": self.flags}
            in_background = self.saves_shards and not self.is_deepspeed_enabled
            if in_background:
                self._shards.start(training_state(self.plain_model, self.optimizer), partial / SHARDS_FOLDER)
        if not in_background:
            self.finish_checkpoint()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.saves_shards:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        if self.is_deepspeed_enabled:
            self.model_wrapped.save_checkpoint(output_dir, exclude_frozen_parameters=True)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))

    def finish_checkpoint(self, *, wait: bool = True) -> None:
        """Put a checkpoint in place, once all processes have written their parts, and delete old ones.

        Every process must call it, and waits for the others; without `wait`, if it is still being written, nothing
        happens.
        """
        if self._unfinished is not None and (wait or self._shards.is_done):
            (name, metadata), self._unfinished = self._unfinished, None
            output_dir = self._get_output_dir(trial=None)
            with self.monitor.pause(), explains_write_errors(output_dir, name):
                self._shards.wait()
                if self.args.should_save:
                    final = commit_checkpoint(output_dir, name, metadata)
                    delete_old(output_dir, self.args.save_total_limit, self.state.best_model_checkpoint)
                    if self.args.push_to_hub:
                        self._push_from_checkpoint(str(final))
        if wait:
            self.accelerator.wait_for_everyone()

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push only once the checkpoint is complete; Trainer would push while it is being saved."""
        if not self._saving:
            super()._push_from_checkpoint(checkpoint_folder)
