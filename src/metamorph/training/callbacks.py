"""Callbacks that stop a run early, on all ranks at the same step: after a signal, or for too many bad records."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from metamorph.data.bad_records import BadRecordLimit, merge_ranks
from metamorph.runs.preemption import Interrupted, Preempted, Preemption, write_marker


logger = logging.getLogger(__name__)


class StopWhenPreempted(TrainerCallback):
    """Stops a run at the first step boundary after a signal, with a checkpoint. Add it after all other callbacks."""

    def __init__(self, preemption: Preemption, resumed_from: str | None = None) -> None:
        self.preemption = preemption
        self.stopped = False
        self._checkpoint = None if resumed_from is None else Path(resumed_from).name

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop before the first step if the signal came while model and data were loaded. From here Ctrl-C saves."""
        self.preemption.catch_interrupt()
        if self.preemption.agreed():
            self._leave(args, state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask all ranks whether one got a signal; if so, save and stop."""
        if self.preemption.agreed():
            if not self.preemption.is_interrupt:  # Ctrl-C is reported at once
                logger.warning("preempted: saving after step %d, then stopping", state.global_step)
            self.stopped = True
            self._checkpoint = f"checkpoint-{state.global_step}"
            args.save_only_model = False  # without the optimizer there is nothing to resume
            args.load_best_model_at_end = False  # time is short
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Trainer also calls it when it stops within an epoch: do not save again, and do not evaluate."""
        if self.stopped:
            control.should_save = control.should_evaluate = False
            args.save_total_limit = None  # with 1, Trainer would now delete all but the best

    def leave_if_stopped(self, trainer: Trainer) -> None:
        """Raise `Preempted` (with the marker written) or `Interrupted` after `trainer.train()`, on all ranks."""
        if self.stopped:
            self._leave(trainer.args, trainer.state)

    def _leave(self, args: TrainingArguments, state: TrainerState) -> NoReturn:
        step, name = state.global_step, self._checkpoint
        if self.preemption.is_interrupt:
            folder = Path(args.output_dir, name or "")
            again = f"; to resume: run the same command again, or --resume_from_checkpoint {folder}" if name else ""
            raise Interrupted(step, f"after step {step}{again}")
        if state.is_world_process_zero:
            reason = None if self.preemption.signal is None else self.preemption.signal.name
            write_marker(args.output_dir, step, name, reason)
            logger.warning("preempted at step %d: the same command resumes from there", step)
        self.preemption.agreed()  # wait for the marker: torchrun ends all processes when the first has exited
        raise Preempted(step)


class StopOnBadRecords(TrainerCallback):
    """Adds up the bad records of all ranks whenever a log entry is due, and at the end of every epoch.

    Each rank stops on its own when it has met too many; this also stops when all ranks together have.
    """

    def __init__(self, limit: BadRecordLimit) -> None:
        self.limit = limit
        self._merged = -1

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """See `check`."""
        if control.should_log:
            self.check(args.device)

    def on_epoch_end(self, args: TrainingArguments, *unused: Any, **kwargs: Any) -> None:
        """See `check`."""
        self.check(args.device)

    def check(self, device: torch.device) -> None:
        """Stop if more than `max_bad_fraction` of all records are bad. `device` is that of the process group."""
        merged = merge_ranks(self.limit, self._merged, device)
        if merged != self._merged:  # a single process checks where it meets them
            self._merged = merged
            self.limit.check()
