"""Feeding the batches of a plan to a data loader."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from torch.utils.data import Dataset, Sampler

from metamorph.data.batching.packing import BatchPlanner


class Examples(Protocol):
    """A data set of training examples."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


class PackedExamples(Dataset[list[dict[str, Any]]]):
    """A data set asked for rows: the index is a list of sample numbers, the item the list of their examples.

    Args:
        dataset: The data set of single examples.
    """

    def __init__(self, dataset: Examples) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        """Number of samples, not of rows: it is what a run reports."""
        return len(self.dataset)

    def __getitem__(self, row: Sequence[int]) -> list[dict[str, Any]]:
        return [self.dataset[index] for index in row]


class PlannedBatches(Sampler[list[Any]]):
    """Batch sampler that yields the batches of one rank, epoch after epoch.

    With packing a batch is a list of rows, for [`PackedExamples`]; without, a list of sample numbers.

    Args:
        planner: Plans the epochs.
        rank: Data-parallel rank.
    """

    def __init__(self, planner: BatchPlanner, rank: int) -> None:
        if not 0 <= rank < planner.world_size:
            raise ValueError(f"rank {rank} is none of the {planner.world_size} ranks that the batches are planned for")
        self.planner = planner
        self.rank = rank
        self.epoch = 0
        self._trained = (0, 0)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration yields.

        Args:
            epoch: Number of the epoch, from 0.
        """
        self.epoch = epoch

    def leave_out(self, epoch: int, rows: int) -> None:
        """Leave out the first rows of an epoch, which an interrupted run has trained on in batches of another size.

        Args:
            epoch: Number of the epoch.
            rows: How many of its rows.
        """
        self._trained = (epoch, rows)

    def __len__(self) -> int:
        return self.planner.steps

    def __iter__(self) -> Iterator[list[Any]]:
        epoch, trained_rows = self._trained
        plan = self.planner.plan(self.epoch, trained_rows if epoch == self.epoch else 0)
        for step in range(plan.steps):
            rows = plan.batch(self.rank, step)
            yield rows if self.planner.packing else [sample for row in rows for sample in row]
