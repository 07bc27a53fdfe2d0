"""Batch sampler and data set for a data loader that follows the batch plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch.utils.data import Dataset, Sampler

from metamorph.data.batching.packing import BatchPlanner


if TYPE_CHECKING:
    from metamorph.data.dataset import MixtureDataset


class PackedSamples(Dataset[list[dict[str, Any]]]):
    """A data set indexed by rows: the index is a list of sample numbers, the item the list of their examples."""

    def __init__(self, dataset: MixtureDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        """Number of samples, not of rows: a run reports it."""
        return len(self.dataset)

    def __getitem__(self, row: Sequence[int]) -> list[dict[str, Any]]:
        return [self.dataset[index] for index in row]


class PlannedBatches(Sampler[list[Any]]):
    """Batch sampler that yields the batches of one data-parallel rank, epoch by epoch.

    With packing a batch is a list of rows, for [`PackedSamples`]; without, a list of sample numbers.
    """

    def __init__(self, planner: BatchPlanner, rank: int) -> None:
        if not 0 <= rank < planner.world_size:
            raise ValueError(f"rank {rank} is none of the {planner.world_size} ranks of the batch plan")
        self.planner = planner
        self.rank = rank
        self.epoch = 0
        self._trained = (0, 0)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch (counted from 0) that the next iteration yields."""
        self.epoch = epoch

    def leave_out(self, epoch: int, rows: int) -> None:
        """Skip the first `rows` rows of an epoch, which an interrupted run has trained on with another batch size."""
        self._trained = (epoch, rows)

    def __len__(self) -> int:
        return self.planner.steps

    def __iter__(self) -> Iterator[list[Any]]:
        epoch, trained_rows = self._trained
        plan = self.planner.plan(self.epoch, trained_rows if epoch == self.epoch else 0)
        for step in range(plan.steps):
            rows = plan.batch(self.rank, step)
            yield rows if self.planner.packing else [sample for row in rows for sample in row]
