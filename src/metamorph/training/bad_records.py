"""Bad records are counted over all ranks, and too many of them stop all ranks at the same step."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from metamorph.data.bad_records import BadRecordLimit, merge_ranks


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
