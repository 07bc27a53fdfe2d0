"""Plans of batches: full and mixed rows, every sample once, the same on all ranks, evenly spread images and targets."""

import numpy as np
import pytest
import torch

from metamorph.data.batching.lengths import Lengths
from metamorph.data.batching.packing import BatchPlanner, PackedSamples, PlannedBatches, Rows, pack_rows


def lengths_of(count: int, seed: int = 0, longest: int = 300) -> Lengths:
    """Many short samples, some long ones, up to four images each."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 5, count).astype(np.int32)
    tokens = np.clip(rng.lognormal(3, 1, count) + 20 * images, 1, longest).astype(np.int32)
    return Lengths(tokens, images, images // 2, np.maximum(tokens - 20 * images, 1))


def planner(lengths: Lengths, **fields) -> BatchPlanner:
    values = {"seed": 3, "world_size": 1, "rows_per_batch": 2, "max_length": 256}
    return BatchPlanner(lengths, **{**values, **fields})


def samples_of(plan, rank: int) -> list[int]:
    return [sample for step in range(plan.steps) for row in plan.batch(rank, step) for sample in row]


MODES = [{"packing": True}, {"packing": False}, {"packing": False, "group_by_length": True}]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 2, 7, 200])
def test_every_sample_once_and_the_same_number_of_steps(mode: dict, world_size: int, count: int) -> None:
    plans = planner(lengths_of(count), world_size=world_size, **mode)
    for epoch in (0, 1, 2):
        plan = plans.plan(epoch)
        assert plan.steps == plans.steps
        seen = [sample for rank in range(world_size) for sample in samples_of(plan, rank)]
        assert sorted(seen) == list(range(count))
        for step in range(plan.steps - 1):
            assert all(len(plan.batch(rank, step)) == 2 for rank in range(world_size))
        last = [len(plan.batch(rank, plan.steps - 1)) for rank in range(world_size)]
        assert max(last) - min(last) <= 1  # what is left is spread evenly
    if count == 200:
        assert samples_of(plans.plan(0), 0) != samples_of(plans.plan(1), 0)


@pytest.mark.parametrize("mode", MODES)
def test_a_plan_depends_on_seed_epoch_lengths_and_ranks_only(mode: dict) -> None:
    one, other = (planner(lengths_of(200), world_size=2, **mode) for _ in range(2))
    other.plan(0)  # what was planned before does not count
    for step in range(one.steps):
        for rank in range(2):
            assert one.plan(4).batch(rank, step) == other.plan(4).batch(rank, step)
    reseeded = planner(lengths_of(200), world_size=2, seed=4, **mode)
    assert samples_of(reseeded.plan(4), 0) != samples_of(one.plan(4), 0)


def test_rows_are_never_longer_than_allowed_and_nearly_full() -> None:
    lengths = lengths_of(3000)
    plans = planner(lengths)
    tokens = np.minimum(lengths.tokens, 256)
    for epoch in range(4):
        rows = plans.rows(epoch)
        assert len(rows) == plans.num_rows
        assert rows.sum(tokens).max() <= 256
    assert plans.efficiency == pytest.approx(tokens.sum() / (plans.num_rows * 256))
    assert plans.efficiency > 0.97


def test_which_samples_share_a_row_is_as_mixed_as_random_rows() -> None:
    """Two tasks of different lengths: packed by length, half of the rows were of one task."""
    rng = np.random.default_rng(0)
    draws = rng.permutation(np.arange(4000) < 2000)
    tokens = np.where(draws, rng.integers(32, 37, 4000), rng.integers(54, 59, 4000)).astype(np.int32)
    plans = planner(Lengths(tokens, draws.astype(np.int32), draws.astype(np.int32), tokens), max_length=1024)
    assert plans.efficiency > 0.97
    for epoch in (0, 1):
        rows = plans.rows(epoch)
        sizes = np.diff(rows.starts)
        random = np.add.reduceat(rng.permutation(draws), rows.starts[:-1], dtype=np.int64) / sizes
        assert (rows.sum(draws) / sizes).std() < 1.3 * random.std()


def test_every_epoch_draws_its_rows() -> None:
    def partners(rows: Rows) -> set[tuple[int, int]]:
        return {(a, b) for row in range(len(rows)) for a in rows[row] for b in rows[row] if a < b}

    plans = planner(lengths_of(400))
    first, second = partners(plans.rows(0)), partners(plans.rows(1))
    assert len(first & second) < 0.05 * len(first)
    assert plans.rows(1) is plans.rows(1)  # packed once
    ordered = planner(lengths_of(400), shuffle=False)
    assert np.array_equal(ordered.rows(1).samples, ordered.rows(0).samples)


def test_all_epochs_have_as_many_rows_as_the_first() -> None:
    """Of many small data sets, some need fewer rows in their second epoch, and some more whatever their order."""
    kinds = set()
    for seed in range(60):
        lengths = lengths_of(50, seed)
        tokens = np.minimum(lengths.tokens, 100)
        plans = planner(lengths, seed=seed, max_length=100)
        first, second = plans.rows(0), plans.rows(1)
        assert len(first) == len(second) == plans.num_rows
        assert sorted(second.samples.tolist()) == list(range(50))
        assert second.sum(tokens).max() <= 100
        assert np.diff(second.starts).min() > 0
        # Where samples of equal length have changed places, the lengths are those of the first epoch.
        kinds.add(np.array_equal(tokens[first.samples], tokens[second.samples]))
    assert kinds == {True, False}


@pytest.mark.parametrize("values", ["answer_images", "text_targets"])
def test_steps_of_any_size_have_the_same_share_of_each_target(values: str) -> None:
    plans = planner(lengths_of(4000))
    for epoch in (0, 1):
        targets = plans.rows(epoch).sum(getattr(plans.lengths, values))
        for size in (8, 13, 24):
            steps = [
                targets[order][: len(order) // size * size].reshape(-1, size).sum(axis=1).std()
                for order in (plans.row_order(epoch), np.random.default_rng(0).permutation(plans.num_rows))
            ]
            assert steps[0] < 0.7 * steps[1], size
    assert not np.array_equal(plans.row_order(0), planner(lengths_of(4000), seed=4).row_order(0))
    resumed = planner(lengths_of(4000), world_size=3, rows_per_batch=5)  # with other batches: the same rows in order
    assert np.array_equal(plans.row_order(1), resumed.row_order(1))
    assert np.array_equal(plans.rows(1).samples, resumed.rows(1).samples)


def test_best_fit_takes_the_row_with_the_least_space_that_suffices() -> None:
    # 6 and 5 open a row of 10 each; 4 fills the first exactly, 3 goes to the second, 2 next to it.
    rows = pack_rows(np.array([2, 3, 4, 5, 6]), max_length=10, order=np.arange(5)[::-1])
    assert sorted(rows[index] for index in range(len(rows))) == [[0, 1, 3], [2, 4]]
    # 7 opens a third row, and the fullest of the three is closed; so 1 goes to the row of 7, not to that of 8.
    rows = pack_rows(np.array([8, 5, 7, 1]), max_length=10, open_rows=2)
    assert [rows[index] for index in range(len(rows))] == [[0], [1], [2, 3]]
    # A full row was never open.
    rows = pack_rows(np.array([8, 5, 10, 1]), max_length=10, open_rows=2)
    assert [rows[index] for index in range(len(rows))] == [[0, 3], [1], [2]]


def test_samples_of_length_zero_and_of_full_length() -> None:
    rows = pack_rows(np.array([0, 10, 0, 10]), max_length=10)
    assert len(rows) == 2
    assert sorted(sample for index in range(2) for sample in rows[index]) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="sample 1 has 11 tokens, more than a row of 10"):
        pack_rows(np.array([3, 11]), max_length=10)


@pytest.mark.parametrize("mode", MODES)
def test_images_and_visual_targets_are_spread_over_the_ranks(mode: dict) -> None:
    """Without dealing out, ranks differ by what chance gives them."""
    lengths = lengths_of(4000)
    plan = planner(lengths, world_size=4, rows_per_batch=4, **mode).plan(0)
    # In the last step, ranks may lack rows.
    dealt = plan.slots[:-1].reshape(-1, 16)
    by_chance = np.random.default_rng(0).permuted(dealt, axis=1)
    for values, share in ((lengths.images, 0.6), (lengths.answer_images, 0.75)):
        counts = plan.rows.sum(values)
        dealt_spread, spread_by_chance = (
            np.ptp(counts[slots].reshape(-1, 4, 4).sum(axis=2), axis=1).mean() for slots in (dealt, by_chance)
        )
        assert dealt_spread < share * spread_by_chance


def test_r24_grouping_by_length_saves_padding() -> None:
    """Padding of a step is what its batches lack to its longest sample; the longest step comes first."""
    lengths = lengths_of(2000)

    def padding(plans: BatchPlanner) -> float:
        plan = plans.plan(0)
        rows = [[lengths.tokens[row[0]] for row in plan.batch(0, step)] for step in range(plan.steps)]
        return sum(max(row) * len(row) - sum(row) for row in rows) / sum(max(row) * len(row) for row in rows)

    fields = {"packing": False, "rows_per_batch": 8, "max_length": 300}
    grouped = planner(lengths, group_by_length=True, **fields)
    assert padding(grouped) < 0.1 < 0.4 < padding(planner(lengths, **fields))
    first = [row[0] for row in grouped.plan(1).batch(0, 0)]
    assert lengths.tokens[first].max() == lengths.tokens.max()


def test_without_shuffling_samples_come_in_their_order() -> None:
    plans = planner(lengths_of(11), packing=False, shuffle=False)
    assert samples_of(plans.plan(5), 0) == list(range(11))


def test_padded_order_is_that_of_trainer_s_own_sampler() -> None:
    """So that a seed gives the same run with any version of this package."""
    expected = torch.randperm(11, generator=torch.Generator().manual_seed(3 + 2)).tolist()
    assert samples_of(planner(lengths_of(11), packing=False).plan(2), 0) == expected


def test_the_sampler_yields_rows_or_samples_of_its_rank() -> None:
    packed, padded = (PlannedBatches(planner(lengths_of(50), packing=flag), rank=0) for flag in (True, False))
    packed.set_epoch(2)
    assert list(packed) == [packed.planner.plan(2).batch(0, step) for step in range(len(packed))]
    assert all(isinstance(sample, int) for batch in padded for sample in batch)
    examples = PackedSamples([{"id": str(index)} for index in range(50)])
    assert len(examples) == 50
    assert examples[[4, 2]] == [{"id": "4"}, {"id": "2"}]
    with pytest.raises(ValueError, match="rank 1 is not one of the 1 ranks"):
        PlannedBatches(packed.planner, rank=1)


def test_bad_values_are_refused() -> None:
    lengths = lengths_of(3)
    with pytest.raises(ValueError, match="--per_device_train_batch_size must be at least 1, not 0"):
        planner(lengths, rows_per_batch=0)
    with pytest.raises(ValueError, match="--model_max_length must be at least 1"):
        planner(lengths, max_length=0)
    with pytest.raises(ValueError, match="group_by_length has no use with --packing True"):
        planner(lengths, packing=True, group_by_length=True)
