"""Which samples share a row and which rows share a batch: decided from lengths alone, before any picture is opened."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from metamorph.data.lengths import Lengths


WINDOW = 16_384
"""Samples that are packed together. Larger windows waste less; samples of one length then meet more often."""
_GROUPED_BATCHES = 64
"""Global batches that are sorted by length together; HF's length-grouped sampler takes 50."""


@dataclass(frozen=True)
class Rows:
    """Samples distributed over rows."""

    samples: np.ndarray
    """int64 `[samples]`: sample numbers, row by row."""
    starts: np.ndarray
    """int64 `[rows + 1]`: row `r` is `samples[starts[r] : starts[r + 1]]`."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> list[int]:
        """The samples of one row."""
        return self.samples[self.starts[row] : self.starts[row + 1]].tolist()

    def sum(self, values: np.ndarray) -> np.ndarray:
        """int64 `[rows]`: the sum of `values` `[samples]` over the samples of each row."""
        total = np.concatenate(([0], np.cumsum(values[self.samples], dtype=np.int64)))
        return total[self.starts[1:]] - total[self.starts[:-1]]


@dataclass(frozen=True)
class BatchPlan:
    """The batches of one epoch. Any of them is looked up by its number, so resuming costs nothing."""

    rows: Rows
    """The rows of the epoch."""
    slots: np.ndarray
    """int64 `[steps, ranks, rows_per_batch]`: row numbers, -1 where the epoch has no rows left."""

    @property
    def steps(self) -> int:
        """Batches of each rank; the same for all."""
        return len(self.slots)

    def batch(self, rank: int, step: int) -> list[list[int]]:
        """The rows of one batch, each a list of sample numbers.

        Empty batches occur only in the last step, and in the first after a resume with batches of another size.

        Args:
            rank: Data-parallel rank.
            step: Number of the batch in the epoch.
        """
        return [self.rows[row] for row in self.slots[step, rank].tolist() if row >= 0]


@dataclass(frozen=True)
class BatchPlanner:
    """Plans the batches of each epoch, the same on all ranks and in every run.

    The plan of an epoch depends on the fields below and on the number of the epoch, and on nothing else: not on the
    number of workers, nor on where a run was interrupted. Every sample is in exactly one batch of an epoch.

    With `packing`, rows are filled by best-fit decreasing: windows of shuffled samples, the longest of a window first,
    each into the row with the least space that suffices; rows with space left stay open for the next window. Which
    samples share a row is decided once by the seed, so that all epochs have the same number of steps; which rows
    share a batch is drawn anew in each epoch. Samples of a row do not see each other.

    Batches take the rows of an epoch in an order that, except with `group_by_length`, depends on neither `world_size`
    nor `rows_per_batch`. What an interrupted run has trained on is a prefix of it, also for a run with other batches.

    Without `packing` a row is one sample. With `group_by_length` the samples of a step (of all ranks) have similar
    lengths, and the step with the longest comes first: if it fits into memory, all do.

    Within each step the rows are dealt out so that the ranks get about the same number of images, because the vision
    tower takes its time for each and the slowest rank decides.
    """

    lengths: Lengths
    """Lengths of the samples. Those above `max_length` count as `max_length`: training cuts them."""
    seed: int
    """Seed of the order (`--data_seed`, else `--seed`)."""
    world_size: int
    """Data-parallel ranks."""
    rows_per_batch: int
    """Rows of one batch of one rank (`--per_device_train_batch_size`)."""
    max_length: int
    """Tokens of a row (`--model_max_length`)."""
    packing: bool = True
    """Whether several samples share a row."""
    group_by_length: bool = False
    """Whether batches without packing hold samples of similar length."""
    shuffle: bool = True
    """False: as the data are ordered (with packing: windows of it)."""
    window: int = WINDOW
    """Samples that are packed together."""

    def __post_init__(self) -> None:
        for name, flag in (
            ("world_size", "the number of processes"),
            ("rows_per_batch", "--per_device_train_batch_size"),
            ("max_length", "--model_max_length"),
            ("window", "the packing window"),
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{flag} must be at least 1, not {getattr(self, name)}")
        check_grouping(self.packing, self.group_by_length)

    @cached_property
    def rows(self) -> Rows:
        """The rows of every epoch."""
        if not self.packing:
            return Rows(np.arange(len(self.lengths)), np.arange(len(self.lengths) + 1))
        order = np.random.default_rng(self.seed).permutation(len(self.lengths)) if self.shuffle else None
        return pack_rows(self._tokens, max_length=self.max_length, window=self.window, order=order)

    @property
    def steps(self) -> int:
        """Batches of each rank in every epoch."""
        return -(-len(self.rows) // (self.world_size * self.rows_per_batch))

    @property
    def efficiency(self) -> float:
        """Share of the positions of full rows (`max_length`) that hold a token."""
        return float(self._tokens.sum() / (len(self.rows) * self.max_length))

    def plan(self, epoch: int, trained_rows: int = 0) -> BatchPlan:
        """The batches of an epoch.

        Args:
            epoch: Number of the epoch, from 0.
            trained_rows: Rows, from the first, that are left out because they have been trained on; the others stay
                in their steps.
        """
        shape = (self.steps, self.world_size, self.rows_per_batch)
        slots = np.full(shape, -1, dtype=np.int64)
        slots.reshape(-1)[trained_rows : len(self.rows)] = self._row_order(epoch)[trained_rows:]
        if self.world_size > 1:
            slots = self._dealt(slots)
        return BatchPlan(self.rows, slots)

    @cached_property
    def _tokens(self) -> np.ndarray:
        return np.minimum(self.lengths.tokens, self.max_length)

    def _row_order(self, epoch: int) -> np.ndarray:
        count = len(self.rows)
        if not self.shuffle:
            return np.arange(count)
        # The permutation that Trainer's own sampler draws: without packing, a seed keeps its order of samples.
        order = torch.randperm(count, generator=torch.Generator().manual_seed(self.seed + epoch)).numpy()
        return self._grouped(order, epoch) if self.group_by_length else order

    def _grouped(self, order: np.ndarray, epoch: int) -> np.ndarray:
        """Sort by length within parts of a shuffled order, then shuffle the steps."""
        step = self.world_size * self.rows_per_batch
        part = step * _GROUPED_BATCHES
        by_length = []
        for start in range(0, len(order), part):
            samples = order[start : start + part]
            by_length.append(samples[np.argsort(-self._tokens[samples], kind="stable")])
        grouped = np.concatenate(by_length)
        whole = len(grouped) // step
        steps = grouped[: whole * step].reshape(whole, step)
        steps = np.random.default_rng([self.seed, epoch]).permutation(steps)
        if whole:
            longest = int(self._tokens[steps].max(axis=1).argmax())
            steps[[0, longest]] = steps[[longest, 0]]
        return np.concatenate([steps.reshape(-1), grouped[whole * step :]])

    def _dealt(self, slots: np.ndarray) -> np.ndarray:
        """Deal the rows of each step to the ranks: most images first, to and fro over the ranks."""
        steps, world, per_rank = slots.shape
        flat = slots.reshape(steps, -1)
        images = np.append(self.rows.sum(self.lengths.images), -1)  # empty slots (-1) come last
        flat = np.take_along_axis(flat, np.argsort(-images[flat], axis=1, kind="stable"), axis=1)
        rounds = flat.reshape(steps, per_rank, world).copy()
        rounds[:, 1::2] = rounds[:, 1::2, ::-1]
        return np.ascontiguousarray(rounds.transpose(0, 2, 1))


def check_grouping(packing: bool, group_by_length: bool) -> None:
    """Refuse to group batches by length where rows are packed.

    Raises:
        ValueError: If both are asked for.
    """
    if packing and group_by_length:
        raise ValueError(
            "--train_sampling_strategy group_by_length has no use with --packing True (the default), which leaves no "
            "padding to save: add --packing False, or drop it"
        )


def pack_rows(tokens: np.ndarray, *, max_length: int, window: int = WINDOW, order: np.ndarray | None = None) -> Rows:
    """Fill rows by best-fit decreasing within windows.

    Args:
        tokens: int `[samples]` lengths, none above `max_length`.
        max_length: Tokens of a row.
        window: Samples that are packed together.
        order: int `[samples]` the order in which samples come into windows; by default that of their numbers.

    Raises:
        ValueError: If a sample is longer than a row.
    """
    if len(tokens) and tokens.max() > max_length:
        raise ValueError(f"sample {tokens.argmax()} has {tokens.max()} tokens, more than a row of {max_length}")
    row_of = np.empty(len(tokens), dtype=np.int64)
    packer = _BestFit(max_length)
    order = np.arange(len(tokens)) if order is None else order
    for start in range(0, len(order), window):
        samples = order[start : start + window]
        samples = samples[np.argsort(-tokens[samples], kind="stable")]
        lengths, counts = np.unique(tokens[samples], return_counts=True)
        rows: list[int] = []
        fills: list[int] = []
        for length, count in zip(lengths[::-1].tolist(), counts[::-1].tolist(), strict=True):
            packer.put(length, count, rows, fills)
        row_of[samples] = np.repeat(rows, fills)
    starts = np.concatenate(([0], np.cumsum(np.bincount(row_of, minlength=packer.num_rows))))
    return Rows(np.argsort(row_of, kind="stable"), starts)


class _BestFit:
    """Open rows by the space that is left in them."""

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self.num_rows = 0
        self._rows: list[list[int]] = [[] for _ in range(max_length + 1)]
        self._spaces = 0  # the spaces that occur, as the bits of one integer: the lowest from `length` on fits best

    def put(self, length: int, count: int, rows: list[int], fills: list[int]) -> None:
        """Place `count` samples of one length; append the rows to `rows`, and to `fills` how many each row takes.

        The row that fits best takes as many as it can: with one sample more it fits better still.
        """
        while count:
            fitting = self._spaces >> length
            if fitting:
                space = length + (fitting & -fitting).bit_length() - 1
                row = self._rows[space].pop()
                if not self._rows[space]:
                    self._spaces ^= 1 << space
            else:
                space, row = self.max_length, self.num_rows
                self.num_rows += 1
            fill = min(count, space // length) if length else count
            count -= fill
            rest = space - fill * length
            if not self._rows[rest]:
                self._spaces |= 1 << rest
            self._rows[rest].append(row)
            rows.append(row)
            fills.append(fill)


def plan_batches(
    lengths: Lengths,
    *,
    seed: int,
    epoch: int,
    world_size: int,
    rows_per_batch: int,
    max_length: int,
    packing: bool = True,
    group_by_length: bool = False,
    window: int = WINDOW,
) -> BatchPlan:
    """Plan a single epoch; see [`BatchPlanner`], which keeps the rows for further ones.

    Args:
        lengths: As in `BatchPlanner`, like all others.
        seed: Seed of the order.
        epoch: Number of the epoch, from 0.
        world_size: Data-parallel ranks.
        rows_per_batch: Rows of one batch of one rank.
        max_length: Tokens of a row.
        packing: Whether several samples share a row.
        group_by_length: Whether batches without packing hold samples of similar length.
        window: Samples that are packed together.
    """
    planner = BatchPlanner(
        lengths,
        seed=seed,
        world_size=world_size,
        rows_per_batch=rows_per_batch,
        max_length=max_length,
        packing=packing,
        group_by_length=group_by_length,
        window=window,
    )
    return planner.plan(epoch)
