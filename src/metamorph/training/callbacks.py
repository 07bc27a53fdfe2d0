"""What stops a run early, on all ranks at the same step: a signal, or too many bad records."""

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
    """Ends a run at the first step boundary after a signal, with a checkpoint. Add it behind all other callbacks.

    Args:
        preemption: Has caught the signals since the run began.
        resumed_from: The checkpoint that the run goes on from, if any.
    """

    def __init__(self, preemption: Preemption, resumed_from: str | None = None) -> None:
        self.preemption = preemption
        self.stopped = False
        self._checkpoint = None if resumed_from is None else Path(resumed_from).name

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop before the first step, if the signal came while model and data were loaded: nothing is lost.

        From here on Ctrl-C saves, too; before, it ends the run.

        Raises:
            Preempted: On all ranks.
        """
        self.preemption.catch_interrupt()
        if self.preemption.agreed():
            self._leave(args, state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask all ranks, behind each optimizer step."""
        if self.preemption.agreed():
            if not self.preemption.is_interrupt:  # which has said so at once
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
        """Trainer calls it when it stops within an epoch, too: do not save again, nor evaluate."""
        if self.stopped:
            control.should_save = control.should_evaluate = False
            args.save_total_limit = None  # with 1 Trainer would now delete all checkpoints but the best

    def leave_if_stopped(self, trainer: Trainer) -> None:
        """To be called behind `trainer.train()`, on all ranks.

        Raises:
            Preempted: If a signal has stopped the run; its marker has been written.
            Interrupted: If Ctrl-C has.
        """
        if self.stopped:
            self._leave(trainer.args, trainer.state)

    def _leave(self, args: TrainingArguments, state: TrainerState) -> NoReturn:
        """Stop, and say how to resume."""
        step, name = state.global_step, self._checkpoint
        if self.preemption.is_interrupt:
            folder = Path(args.output_dir, name or "")
            again = f"; to resume: run the same command again, or --resume_from_checkpoint {folder}" if name else ""
            raise Interrupted(step, f"after step {step}{again}")
        if state.is_world_process_zero:
            reason = None if self.preemption.signal is None else self.preemption.signal.name
            write_marker(args.output_dir, step, name, reason)
            logger.warning("preempted at step %d: the same command resumes from there", step)
        self.preemption.agreed()  # torchrun ends all processes when the first is gone: not before the marker is there
        raise Preempted(step)


class StopOnBadRecords(TrainerCallback):
    """Joins the counts of all ranks whenever a log line is due, and at the end of every epoch.

    A single rank stops by itself as soon as its own bad records are too many; this finds out when those of all ranks
    together are.

    Args:
        limit: The limit of the training data.
    """

    def __init__(self, limit: BadRecordLimit) -> None:
        self.limit = limit
        self._merged = -1

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called by the trainer behind each optimizer step.

        Raises:
            TooManyBadRecordsError: On all ranks, if more than `max_bad_fraction` of all records are bad.
        """
        if control.should_log:
            self.check(args.device)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called by the trainer behind each epoch; see `on_step_end`."""
        self.check(args.device)

    def check(self, device: torch.device) -> None:
        """Join the counts, if any rank has met another bad record, and stop if there are too many.

        Args:
            device: Where the process group communicates.

        Raises:
            TooManyBadRecordsError: On all ranks, if more than `max_bad_fraction` of all records are bad.
        """
        merged = merge_ranks(self.limit, self._merged, device)
        if merged != self._merged:  # the records of a single process are counted where they are met
            self._merged = merged
            self.limit.check()
