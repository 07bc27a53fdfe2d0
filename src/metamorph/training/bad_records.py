"""Bad records are counted over all ranks, and too many of them stop all ranks at the same step."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from metamorph.data.record_log import BadRecordLimit


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
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return  # the data set has counted them all

        def reduce_max(values: torch.Tensor) -> torch.Tensor:
            values = values.to(device)
            dist.all_reduce(values, op=dist.ReduceOp.MAX)
            return values.cpu()

        is_new = torch.tensor([self.limit.num_bad != self._merged], dtype=torch.uint8)
        if reduce_max(is_new).item():
            self.limit.merge(reduce_max)
            self._merged = self.limit.num_bad
            self.limit.check()
