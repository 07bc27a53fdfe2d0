"""How the trainer saves, loads and resumes."""

import json
import logging
import math
import pickle
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerState
from transformers.trainer_utils import TrainOutput

from metamorph.data.batching.sampler import PlannedBatches
from metamorph.files.permissions import apply_umask
from metamorph.models.adapters import has_adapter, load_adapter_weights, save_adapter
from metamorph.models.connector import load_connector, save_connector
from metamorph.runs.checkpoint_files import (
    PARTIAL_FOLDER,
    PREFIX,
    CheckpointError,
    begin_checkpoint,
    commit_checkpoint,
    delete_old,
    explains_write_errors,
    flush,
)
from metamorph.runs.lock import check_lock
from metamorph.training.checkpoints.resume import Position, ResumePoint, describe_data
from metamorph.training.checkpoints.weights import ARGUMENTS_FILE, TRAINER_STATE_FILE, load_weights
from metamorph.training.engines.prepare import whole_weights
from metamorph.training.engines.sharded_trainer import ShardedTrainer
from metamorph.training.reporting.model_card import CardFacts, write_model_card


logger = logging.getLogger(__name__)

_GIVEN_BY_FLAGS = ("initial_lr", "weight_decay", "betas", "eps")
"""Values of an optimizer's groups that a checkpoint does not decide; of the rates, the scheduler takes care."""


class CheckpointingTrainer(ShardedTrainer):
    """`transformers.Trainer` whose checkpoints hold what the stage trains and all that resuming needs.

    They are written to a folder beside and renamed when they are complete. Some methods of Trainer that are overridden
    here are private; they are the same in all versions that we support, and there is no public hook in their place.
    """

    stage: int
    batches: PlannedBatches
    resume_point: ResumePoint | None = None
    card_facts: CardFacts | None = None
    """What the model card is made of; without them there is none."""
    flags: dict[str, Any] | None = None
    """Result of `flags_of_run`, which checkpoints tell."""
    _given: list[dict[str, Any]]
    _saving = False
    _knows_its_place = True
    """Whether the number of the step tells the place in the data."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write `README.md` into `output_dir`; Trainer calls it before it pushes to the Hub.

        Args:
            *args: Ignored: ours says what was trained, and on what.
            **kwargs: Ignored, too.
        """
        if self.card_facts is not None and self.is_world_process_zero():
            write_model_card(str(self.args.output_dir), self.card_facts, self.state)

    def go_on_from(self, point: ResumePoint | None) -> None:
        """Choose where in the data `train` goes on from its checkpoint. To be called on all processes.

        Args:
            point: Result of `plan_resume`. None: as Trainer finds from the number of the step.
        """
        self.resume_point = point
        if point is not None:
            self.batches.leave_out(point.epoch, point.trained_rows)

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> TrainOutput:
        """Train, or only load the weights of the run's result, if the checkpoint is already at the last step.

        `transformers.Trainer` would do one step too many there (seen in 5.23, when the last step is not the last of
        an epoch), so that restarting a finished run would change its result.

        Args:
            resume_from_checkpoint: Folder of a checkpoint.
            **kwargs: As for `transformers.Trainer.train`.

        Raises:
            CheckpointError: if a file of the checkpoint holds more than tensors and numbers.
        """
        if resume_from_checkpoint is not None:
            self._knows_its_place = not self.args.ignore_data_skip
            state = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / TRAINER_STATE_FILE))
            if self.resume_point is not None:
                state.global_step = self.resume_point.step
            if self._is_finished(state):
                logger.info("%s is at the last step already: there is nothing left to train", resume_from_checkpoint)
                best = state.best_model_checkpoint if self.args.load_best_model_at_end else None
                self._load_from_checkpoint(resume_from_checkpoint if best is None else best)
                self.state = state
                return TrainOutput(state.global_step, math.nan, {})
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        except pickle.UnpicklingError as error:  # all of its files are read with weights_only=True
            raise CheckpointError(
                f"optimizer, scheduler or rng_state of {resume_from_checkpoint} hold more than tensors and numbers; "
                "that is refused because loading it can run code: resume from another checkpoint"
            ) from error

    def _is_finished(self, state: TrainerState) -> bool:
        if self.args.max_steps > 0:
            return state.global_step >= self.args.max_steps
        return (state.epoch or 0) >= self.args.num_train_epochs

    def _init_training_state(self, max_steps: int, steps_in_epoch: int, *args: Any) -> tuple[int, int]:
        """Trainer derives its place from the step of the checkpoint; ours may count in steps of another size."""
        place = super()._init_training_state(max_steps, steps_in_epoch, *args)
        if self.resume_point is None:
            return place
        self.state.global_step = self.resume_point.step
        epoch, steps = divmod(self.resume_point.step, steps_in_epoch)
        return epoch, steps * self.args.gradient_accumulation_steps

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """As Trainer does; what the flags say of the optimizer is noted, before a checkpoint is loaded over it.

        Args:
            num_training_steps: Optimizer steps of the run.
            optimizer: By default the trainer's.
        """
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        optimizer = self.optimizer if optimizer is None else optimizer
        assert optimizer is not None
        groups = optimizer.param_groups
        self._given = [{name: group[name] for name in _GIVEN_BY_FLAGS if name in group} for group in groups]
        return scheduler

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As Trainer does, but learning rates and weight decay stay those of this run, not those of the checkpoint."""
        scheduler = self.lr_scheduler
        rates = list(getattr(scheduler, "base_lrs", []))
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        assert self.optimizer is not None
        for group, given in zip(self.optimizer.param_groups, self._given, strict=True):
            group.update(given)
        counts_anew = self.resume_point is not None and self.resume_point.counts_anew
        if not isinstance(scheduler, LambdaLR):  # it keeps the rates themselves
            if counts_anew:
                logger.warning("%s keeps its own count of steps", type(scheduler).__name__)
            return
        step = self.resume_point.step if counts_anew and self.resume_point is not None else scheduler.last_epoch
        # With --learning_rate auto, steps of another size have another peak rate, too.
        scheduler.load_state_dict({**scheduler.state_dict(), "base_lrs": rates, "last_epoch": step - 1})
        scheduler.step()  # sets the rates of this step

    @cached_property
    def _data_description(self) -> dict[str, Any]:
        return describe_data(self.train_dataset, self.batches.planner)

    def _get_output_dir(self, trial: Any) -> str:
        """While a checkpoint is being written, the folder in which it takes shape."""
        folder = super()._get_output_dir(trial)
        return str(Path(folder) / PARTIAL_FOLDER) if self._saving else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save as Trainer does, but so that there is a checkpoint at no time that is not complete.

        Raises:
            CheckpointError: If it cannot be written; the last good one is still there.
        """
        output_dir, name = self._get_output_dir(trial), f"{PREFIX}{self.state.global_step}"
        with explains_write_errors(output_dir, name):
            if self.args.should_save:
                check_lock(output_dir)
                begin_checkpoint(output_dir)
            self.accelerator.wait_for_everyone()
            self._saving = True
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._saving = False
            self._name_best(Path(output_dir) / PARTIAL_FOLDER / name, Path(output_dir) / name)
            if self.args.local_process_index == 0:
                flush(output_dir)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                commit_checkpoint(output_dir, name, self._record())
                delete_old(output_dir, self.args.save_total_limit, self.state.best_model_checkpoint)
            self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(Path(output_dir) / name))

    def _record(self) -> dict[str, Any]:
        """What resuming has to know beside the state of the trainer."""
        position = Position.at(self.state.global_step, self.batches.planner, self.args.gradient_accumulation_steps)
        return {
            "step": self.state.global_step,
            "stage": self.stage,
            "position": asdict(position) if self._knows_its_place else None,
            "data": self._data_description,
            "flags": self.flags,
        }

    def _name_best(self, partial: Path, final: Path) -> None:
        """If this is the best checkpoint so far, Trainer has noted, on all processes, where it took shape."""
        if self.state.best_model_checkpoint == str(partial):
            self.state.best_model_checkpoint = str(final)
            if self.args.should_save:
                self.state.save_to_json(str(partial / TRAINER_STATE_FILE))

    def _load_best_model(self) -> None:
        """Trainer knows whole models and PEFT's adapters only: no connectors, and nothing beside an adapter."""
        if self.is_sharded:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Trainer pushes in the middle of saving: not before the checkpoint is in its place."""
        if not self._saving:
            super()._push_from_checkpoint(checkpoint_folder)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write connector (stage 1) or model (stage 2), configuration and processor; the main process only."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        if self.stage == 1:
            save_connector(self.model, folder, state_dict)
            self.model.config.save_pretrained(folder)
        elif has_adapter(self.model):
            self.model.generation_config.eos_token_id = self.processing_class.end_of_turn_token_ids
            save_adapter(self.model, folder, self.model.adapter_base, state_dict)
        else:
            # Base language models name one end token; ours also end their turns.
            self.model.generation_config.eos_token_id = self.processing_class.end_of_turn_token_ids
            self.model.save_pretrained(folder, state_dict=state_dict)
            apply_umask(*folder.glob("*.safetensors"))
            # It notes the precision that the first weight computes in; those in the files are float32 with any engine.
            self.model.config.dtype = torch.float32
            self.model.config.save_pretrained(folder)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        arguments = json.dumps(self.args.to_sanitized_dict(), indent=2, default=str)
        (folder / ARGUMENTS_FILE).write_text(arguments + "\n", encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_sharded:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        elif self.stage == 1:
            load_connector(self.model, resume_from_checkpoint)
        elif has_adapter(self.model):
            load_adapter_weights(self.model, resume_from_checkpoint)
        else:
            with whole_weights(self.args):
                load_weights(self.model, resume_from_checkpoint)
