"""The batch plan: which samples share a row, and which rows share a batch. It depends on lengths alone."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from metamorph.data.batching.lengths import Lengths


if TYPE_CHECKING:
    from metamorph.data.dataset import MixtureDataset

PACKING_VERSION = 2
"""Checkpoints of packed runs with another number are refused. Raise it whenever the same lengths and the same seed give
other rows, or the same rows in another order."""
OPEN_ROWS = 16
"""Rows that are filled at the same time. More hardly fill them better."""
_LATER_OPEN_ROWS = 64
"""The same after the first epoch, which later epochs must not exceed in rows."""
_ATTEMPTS = 4
"""Orders that a later epoch tries until one needs no more rows than the first epoch."""
_GOLDEN_RATIO = (5**0.5 - 1) / 2
_GROUPED_BATCHES = 64
"""Global batches that are sorted by length together; HF's length-grouped sampler takes 50."""


@dataclass(frozen=True)
class Rows:
    """Rows of samples, in the layout of a CSR matrix."""

    samples: np.ndarray
    """int64 `[samples]`: sample numbers, row by row."""
    starts: np.ndarray
    """int64 `[rows + 1]`: row `r` is `samples[starts[r] : starts[r + 1]]`."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> list[int]:
        return self.samples[self.starts[row] : self.starts[row + 1]].tolist()

    def sum(self, values: np.ndarray) -> np.ndarray:
        """int64 `[rows]`: the sum of `values` `[samples]` over the samples of each row."""
        total = np.concatenate(([0], np.cumsum(values[self.samples], dtype=np.int64)))
        return total[self.starts[1:]] - total[self.starts[:-1]]


@dataclass(frozen=True)
class BatchPlan:
    """The batches of one epoch. Any of them is looked up by its number, so resuming costs nothing."""

    rows: Rows
    slots: np.ndarray
    """int64 `[steps, ranks, rows_per_batch]`: row numbers, -1 where the epoch has no rows left."""

    @property
    def steps(self) -> int:
        """Batches of each rank."""
        return len(self.slots)

    def batch(self, rank: int, step: int) -> list[list[int]]:
        """The rows of one batch, each a list of sample numbers.

        A batch may be empty in the last step, and in the first step after a resume with another batch size.
        """
        return [self.rows[row] for row in self.slots[step, rank].tolist() if row >= 0]


@dataclass(frozen=True)
class BatchPlanner:
    """Plans the batches of each epoch, identically on all ranks and in every run.

    The plan of an epoch depends only on the fields below and on the number of the epoch, not on the number of workers
    or on where a run was interrupted. Each sample is in exactly one batch of an epoch.

    With `packing`, each epoch packs its own permutation of the samples ([`pack_rows`]), which do not attend to each
    other. All epochs have the same number of rows, and so of steps. Rows are in random but stratified order:
    consecutive rows have about the same share of the visual targets as of the text targets of the epoch.

    Without `packing`, a row is one sample. With `group_by_length`, the samples of a step (over all ranks) have similar
    lengths, and the step with the longest comes first: if it fits into memory, all do.

    Except with `group_by_length`, the order of the rows does not depend on `world_size` or `rows_per_batch`. So an
    interrupted run has trained on a prefix of it, and may continue with another batch size.
    """

    lengths: Lengths
    """Those above `max_length` count as `max_length`, because training truncates."""
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
    """False keeps the order of the data."""
    _packed: dict[int, Rows] = field(default_factory=dict, init=False, repr=False, compare=False)
    """The rows of the last epoch that was packed, by its number."""

    def __post_init__(self) -> None:
        for name, flag in (
            ("world_size", "the number of processes"),
            ("rows_per_batch", "--per_device_train_batch_size"),
            ("max_length", "--model_max_length"),
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{flag} must be at least 1, not {getattr(self, name)}")
        check_grouping(self.packing, self.group_by_length)

    @cached_property
    def num_rows(self) -> int:
        """Rows of every epoch."""
        return len(self.rows(0))

    def rows(self, epoch: int) -> Rows:
        """The rows of an epoch (counted from 0), numbered as they were opened."""
        if not self.packing:
            return Rows(np.arange(len(self.lengths)), np.arange(len(self.lengths) + 1))
        epoch = epoch if self.shuffle else 0
        if epoch not in self._packed:
            rows = self._pack(epoch)
            self._packed.clear()
            self._packed[epoch] = rows
        return self._packed[epoch]

    @property
    def steps(self) -> int:
        """Batches of each rank in every epoch."""
        return -(-self.num_rows // (self.world_size * self.rows_per_batch))

    @property
    def efficiency(self) -> float:
        """Share of positions that are a token and not padding, in rows of `max_length`."""
        return float(self._tokens.sum() / (self.num_rows * self.max_length))

    def plan(self, epoch: int, trained_rows: int = 0) -> BatchPlan:
        """The batches of an epoch (counted from 0) without its first `trained_rows` rows; others keep their step."""
        slots = np.full((self.steps, self.world_size, self.rows_per_batch), -1, dtype=np.int64)
        slots.reshape(-1)[trained_rows : self.num_rows] = self.row_order(epoch)[trained_rows:]
        rows = self.rows(epoch)
        if self.world_size > 1:
            slots = self._dealt(slots, rows)
        return BatchPlan(rows, slots)

    def row_order(self, epoch: int) -> np.ndarray:
        """int64 `[rows]`: row numbers of an epoch in the order of training."""
        if not self.shuffle:
            return np.arange(self.num_rows)
        if self.packing:
            rows = self.rows(epoch)
            visual, text = rows.sum(self.lengths.answer_images), rows.sum(self.lengths.text_targets)
            return _stratified(visual, text, np.random.default_rng([self.seed, epoch, 1]))
        # The permutation of Trainer's own sampler: without packing, a seed keeps its order of samples.
        order = torch.randperm(self.num_rows, generator=torch.Generator().manual_seed(self.seed + epoch)).numpy()
        return self._grouped(order, epoch) if self.group_by_length else order

    @cached_property
    def _tokens(self) -> np.ndarray:
        return np.minimum(self.lengths.tokens, self.max_length)

    def _pack(self, epoch: int) -> Rows:
        tokens, max_length = self._tokens, self.max_length
        if not self.shuffle:
            return pack_rows(tokens, max_length=max_length)
        rng = np.random.default_rng([self.seed, epoch])
        if epoch == 0:
            return pack_rows(tokens, max_length=max_length, order=rng.permutation(len(tokens)))
        # The scheduler and resuming need the same number of steps in every epoch. Too few rows are easily split.
        for _ in range(_ATTEMPTS):
            order = rng.permutation(len(tokens))
            rows = pack_rows(tokens, max_length=max_length, order=order, open_rows=_LATER_OPEN_ROWS)
            if len(rows) <= self.num_rows:
                return _split(rows, self.num_rows)
        # Too many cannot be helped: reuse the rows of the first epoch, with other samples of the same lengths.
        first, exchanged = self.rows(0), np.empty(len(tokens), dtype=np.int64)
        exchanged[np.argsort(tokens[first.samples], kind="stable")] = np.lexsort((rng.permutation(len(tokens)), tokens))
        return Rows(exchanged, first.starts)

    def _grouped(self, order: np.ndarray, epoch: int) -> np.ndarray:
        """Sort by length within parts of a shuffled order, then shuffle the steps."""
        step = self.world_size * self.rows_per_batch
        parts = np.split(order, range(step * _GROUPED_BATCHES, len(order), step * _GROUPED_BATCHES))
        grouped = np.concatenate([part[np.argsort(-self._tokens[part], kind="stable")] for part in parts])
        num_full = len(grouped) // step
        steps = grouped[: num_full * step].reshape(num_full, step)
        # The seed is that of `_pack`, which is not used with groups. Another would change the order of resumed runs.
        steps = np.random.default_rng([self.seed, epoch]).permutation(steps)
        if num_full:
            longest = int(self._tokens[steps].max(axis=1).argmax())
            steps[[0, longest]] = steps[[longest, 0]]
        return np.concatenate([steps.reshape(-1), grouped[num_full * step :]])

    def _dealt(self, slots: np.ndarray, rows: Rows) -> np.ndarray:
        """Deal the rows of each step so that the ranks get about the same number of images.

        The vision tower takes its time for each image, and the slowest rank decides.
        """
        steps, world, per_rank = slots.shape
        flat = slots.reshape(steps, -1)
        images, answers = (
            np.append(rows.sum(values), -1)[flat]  # empty slots (-1) come last
            for values in (self.lengths.images, self.lengths.answer_images)
        )
        # Most images first; among equals most answer images first, so that these are spread, too.
        flat = np.take_along_axis(flat, np.lexsort((-answers, -images), axis=1), axis=1)
        rounds = flat.reshape(steps, per_rank, world).copy()
        rounds[:, 1::2] = rounds[:, 1::2, ::-1]  # back and forth over the ranks, like the players of a draft
        return np.ascontiguousarray(rounds.transpose(0, 2, 1))


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
            raise ValueError(f"rank {rank} is not one of the {planner.world_size} ranks of the batch plan")
        self.planner = planner
        self.rank = rank
        self.epoch = 0
        self._trained = (0, 0)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch (counted from 0) that the next iteration yields."""
        self.epoch = epoch

    def skip_rows(self, epoch: int, rows: int) -> None:
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


def check_grouping(packing: bool, group_by_length: bool) -> None:
    """Refuse to group batches by length if rows are packed."""
    if packing and group_by_length:
        raise ValueError(
            "--train_sampling_strategy group_by_length has no use with --packing True (the default), which leaves no "
            "padding to save: add --packing False, or drop it"
        )


def pack_rows(
    tokens: np.ndarray, *, max_length: int, order: np.ndarray | None = None, open_rows: int = OPEN_ROWS
) -> Rows:
    """Fill rows by best fit: each sample goes into the open row with the least space that suffices.

    Samples are placed in `order`, int `[samples]`. In a random order, the samples of a row are nearly as mixed as
    random ones. Ordered by length, which would fill rows a little better, they would have one length, and often come
    from one task.

    Raises:
        ValueError: If a sample is longer than a row.
    """
    if len(tokens) and tokens.max() > max_length:
        raise ValueError(f"sample {tokens.argmax()} has {tokens.max()} tokens, more than a row of {max_length}")
    order = np.arange(len(tokens)) if order is None else order
    row_of = np.empty(len(tokens), dtype=np.int64)
    spaces: list[int] = []  # free tokens of the open rows, ascending
    rows: list[int] = []  # their numbers
    num_rows = 0
    placed = []
    for length in tokens[order].tolist():
        best = bisect_left(spaces, length)
        if best < len(spaces):
            space, row = spaces.pop(best) - length, rows.pop(best)
        else:
            space, row = max_length - length, num_rows
            num_rows += 1
        placed.append(row)
        if space:
            place = bisect_left(spaces, space)
            spaces.insert(place, space)
            rows.insert(place, row)
            if len(spaces) > open_rows:  # close the fullest
                del spaces[0], rows[0]
    row_of[order] = placed
    starts = np.concatenate(([0], np.cumsum(np.bincount(row_of, minlength=num_rows))))
    return Rows(np.argsort(row_of, kind="stable"), starts)


def _split(rows: Rows, count: int) -> Rows:
    """Halve the rows with the most samples until there are `count` rows."""
    starts = rows.starts
    while (missing := count + 1 - len(starts)) > 0:
        sizes = np.diff(starts)
        largest = np.argsort(-sizes, kind="stable")[:missing]
        largest = largest[sizes[largest] > 1]
        starts = np.sort(np.concatenate([starts, starts[largest] + sizes[largest] // 2]))
    return Rows(rows.samples, starts)


def _stratified(first: np.ndarray, second: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An order of rows in which any consecutive ones have about the mean of both values: `first` above all."""
    # Similar rows become neighbours. Second values rise and fall in turn, so that they, too, are similar where the
    # first ones change. Ties are random.
    direction = np.unique(first, return_inverse=True)[1] % 2 * 2 - 1
    similar = np.lexsort((rng.permutation(len(first)), second * direction, first))
    # Steps of the golden ratio (a Kronecker sequence), from a random place on: any stretch of it is spread evenly.
    places = np.argsort((rng.random() + np.arange(len(first)) * _GOLDEN_RATIO) % 1)
    order = np.empty_like(similar)
    order[places] = similar
    return order
