"""Which samples share a row and which rows share a batch: decided from lengths alone, before any picture is opened."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from metamorph.data.batching.lengths import Lengths


PACKING_VERSION = 2
"""Checkpoints of packed runs with another number are refused. Raise it whenever the same lengths and the same seed give
other rows, or the same rows in another order."""
OPEN_ROWS = 16
"""Rows that are filled at the same time. More hardly fill them better."""
_LATER_OPEN_ROWS = 64
"""The same, in epochs after the first: the little that it saves keeps them below the rows of the first."""
_ATTEMPTS = 4
"""Orders that an epoch after the first tries until one needs no more rows than the first."""
_GOLDEN_RATIO = (5**0.5 - 1) / 2
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

    With `packing`, each epoch packs its own permutation of the samples ([`pack_rows`]), so that the samples of a row
    are as mixed as those of a random batch. All epochs have as many rows, and so as many steps, as the first: rows are
    split where an epoch needs fewer, and where it needs more in each of a few orders, it takes the rows of the first
    epoch, in which samples of equal length change places. Samples of a row do not see each other.

    Batches take the rows of an epoch in an order that, except with `group_by_length`, depends on neither `world_size`
    nor `rows_per_batch`. What an interrupted run has trained on is a prefix of it, also for a run with other batches.
    With `packing` the order is random but stratified: consecutive rows, however many, have about the same share of the
    visual targets as of the text targets of the epoch.

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
    """False: as the data are ordered."""
    _packed: dict[int, Rows] = field(default_factory=dict, init=False, repr=False, compare=False)
    """The rows of the epoch that was packed last, by its number."""

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
        """The rows of an epoch, numbered as they were opened. Those of the last epoch that was asked for are kept.

        Args:
            epoch: Number of the epoch, from 0.
        """
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
        """Share of the positions of full rows (`max_length`) that hold a token."""
        return float(self._tokens.sum() / (self.num_rows * self.max_length))

    def plan(self, epoch: int, trained_rows: int = 0) -> BatchPlan:
        """The batches of an epoch.

        Args:
            epoch: Number of the epoch, from 0.
            trained_rows: Rows, from the first, that are left out because they have been trained on; the others stay
                in their steps.
        """
        shape = (self.steps, self.world_size, self.rows_per_batch)
        slots = np.full(shape, -1, dtype=np.int64)
        slots.reshape(-1)[trained_rows : self.num_rows] = self.row_order(epoch)[trained_rows:]
        rows = self.rows(epoch)
        if self.world_size > 1:
            slots = self._dealt(slots, rows)
        return BatchPlan(rows, slots)

    def row_order(self, epoch: int) -> np.ndarray:
        """int64 `[rows]`: the numbers of the rows of an epoch in the order in which they are trained on.

        Args:
            epoch: Number of the epoch, from 0.
        """
        if not self.shuffle:
            return np.arange(self.num_rows)
        if self.packing:
            rows = self.rows(epoch)
            visual, text = rows.sum(self.lengths.answer_images), rows.sum(self.lengths.text_targets)
            return _stratified(visual, text, np.random.default_rng([self.seed, epoch, 1]))
        # The permutation that Trainer's own sampler draws: without packing, a seed keeps its order of samples.
        order = torch.randperm(self.num_rows, generator=torch.Generator().manual_seed(self.seed + epoch)).numpy()
        return self._grouped(order, epoch) if self.group_by_length else order

    @cached_property
    def _tokens(self) -> np.ndarray:
        return np.minimum(self.lengths.tokens, self.max_length)

    def _pack(self, epoch: int) -> Rows:
        tokens, max_length = self._tokens, self.max_length
        if not self.shuffle:
            return pack_rows(tokens, max_length=max_length)
        draws = np.random.default_rng([self.seed, epoch])
        if epoch == 0:
            return pack_rows(tokens, max_length=max_length, order=draws.permutation(len(tokens)))
        for _ in range(_ATTEMPTS):
            order = draws.permutation(len(tokens))
            rows = pack_rows(tokens, max_length=max_length, order=order, open_rows=_LATER_OPEN_ROWS)
            if len(rows) <= self.num_rows:
                return _split(rows, self.num_rows)
        return _exchanged(self.rows(0), tokens, draws)

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
        # The stream of `_pack`, which no run with groups uses. Another would change the order of resumed runs.
        steps = np.random.default_rng([self.seed, epoch]).permutation(steps)
        if whole:
            longest = int(self._tokens[steps].max(axis=1).argmax())
            steps[[0, longest]] = steps[[longest, 0]]
        return np.concatenate([steps.reshape(-1), grouped[whole * step :]])

    def _dealt(self, slots: np.ndarray, rows: Rows) -> np.ndarray:
        """Deal the rows of each step to the ranks: most images first, to and fro over the ranks.

        Of rows with as many images, those with the most in answers come first, so that these are spread, too.
        """
        steps, world, per_rank = slots.shape
        flat = slots.reshape(steps, -1)
        images, answers = (
            np.append(rows.sum(values), -1)[flat]  # empty slots (-1) come last
            for values in (self.lengths.images, self.lengths.answer_images)
        )
        flat = np.take_along_axis(flat, np.lexsort((-answers, -images), axis=1), axis=1)
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


def pack_rows(
    tokens: np.ndarray, *, max_length: int, order: np.ndarray | None = None, open_rows: int = OPEN_ROWS
) -> Rows:
    """Fill rows by best fit: each sample goes into the open row with the least space that suffices.

    A row is closed when it is full, or when it is the fullest of more than `open_rows` open rows. In a random order,
    the samples of a row are nearly as mixed as random ones. Ordered by length, which would fill rows a little better,
    they would have one length, and often one task.

    Args:
        tokens: int `[samples]` lengths, none above `max_length`.
        max_length: Tokens of a row.
        order: int `[samples]` the order in which samples are placed; by default that of their numbers.
        open_rows: Rows that are filled at the same time.

    Raises:
        ValueError: If a sample is longer than a row.
    """
    if len(tokens) and tokens.max() > max_length:
        raise ValueError(f"sample {tokens.argmax()} has {tokens.max()} tokens, more than a row of {max_length}")
    order = np.arange(len(tokens)) if order is None else order
    row_of = np.empty(len(tokens), dtype=np.int64)
    spaces: list[int] = []  # of the open rows, least first
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
            if len(spaces) > open_rows:
                del spaces[0], rows[0]
    row_of[order] = placed
    starts = np.concatenate(([0], np.cumsum(np.bincount(row_of, minlength=num_rows))))
    return Rows(np.argsort(row_of, kind="stable"), starts)


def _split(rows: Rows, count: int) -> Rows:
    """Halve the rows of the most samples until there are `count`."""
    starts = rows.starts
    while (missing := count + 1 - len(starts)) > 0:
        sizes = np.diff(starts)
        largest = np.argsort(-sizes, kind="stable")[:missing]
        largest = largest[sizes[largest] > 1]
        starts = np.sort(np.concatenate([starts, starts[largest] + sizes[largest] // 2]))
    return Rows(rows.samples, starts)


def _exchanged(rows: Rows, tokens: np.ndarray, draws: np.random.Generator) -> Rows:
    """Let samples of equal length change places."""
    samples = np.empty_like(rows.samples)
    samples[np.argsort(tokens[rows.samples], kind="stable")] = np.lexsort((draws.permutation(len(tokens)), tokens))
    return Rows(samples, rows.starts)


def _stratified(first: np.ndarray, second: np.ndarray, draws: np.random.Generator) -> np.ndarray:
    """An order in which all consecutive rows have about the mean of both values: `first` above all.

    Rows are sorted by their values, and taken from a random place on in steps of the golden ratio (a Kronecker
    sequence): any stretch of it is spread evenly.

    Args:
        first: int `[rows]`.
        second: int `[rows]`.
        draws: Decides where to begin, and between equal rows.

    Returns:
        int64 `[rows]` row numbers.
    """
    # Second values rise and fall in turn, so that they, too, are similar where the first ones change.
    turns = np.unique(first, return_inverse=True)[1] % 2 * 2 - 1
    similar = np.lexsort((draws.permutation(len(first)), second * turns, first))
    places = np.argsort((draws.random() + np.arange(len(first)) * _GOLDEN_RATIO) % 1)
    order = np.empty_like(similar)
    order[places] = similar
    return order
