"""Plans of batches: full rows, every sample once, the same on all ranks, evenly spread images."""

import numpy as np
import pytest
import torch

from metamorph.data.batches import PackedExamples, PlannedBatches
from metamorph.data.lengths import Lengths
from metamorph.data.packing import BatchPlanner, pack_rows, plan_batches


def lengths_of(count: int, seed: int = 0, longest: int = 300) -> Lengths:
    """Many short samples, some long ones, up to four images each."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 5, count).astype(np.int32)
    tokens = np.clip(rng.lognormal(3, 1, count) + 20 * images, 1, longest).astype(np.int32)
    return Lengths(tokens, images, images // 2)


def planner(lengths: Lengths, **fields) -> BatchPlanner:
    values = {"seed": 3, "world_size": 1, "rows_per_batch": 2, "max_length": 256, "window": 64}
    return BatchPlanner(lengths, **{**values, **fields})


def samples_of(plan, rank: int) -> list[int]:
    return [sample for step in range(plan.steps) for row in plan.batch(rank, step) for sample in row]


MODES = [{"packing": True}, {"packing": False}, {"packing": False, "group_by_length": True}]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 2, 7, 200])
def test_every_sample_once_and_the_same_number_of_steps(mode: dict, world_size: int, count: int) -> None:
    plans = planner(lengths_of(count), world_size=world_size, **mode)
    for epoch in (0, 1):
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
    single = plan_batches(
        lengths_of(200), seed=3, epoch=4, world_size=2, rows_per_batch=2, max_length=256, window=64, **mode
    )
    assert samples_of(single, 1) == samples_of(one.plan(4), 1)


def test_rows_are_never_longer_than_allowed_and_nearly_full() -> None:
    lengths = lengths_of(3000)
    plans = planner(lengths, window=500)
    tokens = np.minimum(lengths.tokens, 256)
    assert plans.rows.sum(tokens).max() <= 256
    assert plans.efficiency == pytest.approx(tokens.sum() / (len(plans.rows) * 256))
    assert plans.efficiency > 0.98


def test_best_fit_takes_the_row_with_the_least_space_that_suffices() -> None:
    # 6 and 5 open a row of 10 each; 4 fills the first exactly, 3 goes to the second, 2 beside it.
    rows = pack_rows(np.array([2, 3, 4, 5, 6]), max_length=10)
    assert sorted(rows[index] for index in range(len(rows))) == [[0, 1, 3], [2, 4]]


def test_samples_of_length_zero_and_of_full_length() -> None:
    rows = pack_rows(np.array([0, 10, 0, 10]), max_length=10)
    assert len(rows) == 2
    assert sorted(sample for index in range(2) for sample in rows[index]) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="sample 1 has 11 tokens, more than a row of 10"):
        pack_rows(np.array([3, 11]), max_length=10)


@pytest.mark.parametrize("mode", MODES)
def test_images_are_spread_over_the_ranks(mode: dict) -> None:
    """Without dealing out, ranks differ by what chance gives them."""
    lengths = lengths_of(4000)
    plan = planner(lengths, world_size=4, rows_per_batch=4, **mode).plan(0)
    images = np.zeros((plan.steps, 4))
    for step in range(plan.steps):
        for rank in range(4):
            images[step, rank] = sum(lengths.images[row].sum() for row in plan.batch(rank, step))
    spread = (images.max(axis=1) - images.min(axis=1))[:-1].mean()
    flat = np.random.default_rng(0).permutation(images.reshape(-1)).reshape(images.shape)
    assert spread < 0.6 * (flat.max(axis=1) - flat.min(axis=1)).mean() or spread < 1


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
    examples = PackedExamples([{"id": str(index)} for index in range(50)])
    assert len(examples) == 50
    assert examples[[4, 2]] == [{"id": "4"}, {"id": "2"}]
    with pytest.raises(ValueError, match="rank 1 is none of the 1 ranks"):
        PlannedBatches(packed.planner, rank=1)


def test_bad_values_are_refused() -> None:
    lengths = lengths_of(3)
    with pytest.raises(ValueError, match="--per_device_train_batch_size must be at least 1, not 0"):
        planner(lengths, rows_per_batch=0)
    with pytest.raises(ValueError, match="--model_max_length must be at least 1"):
        planner(lengths, max_length=0)
    with pytest.raises(ValueError, match="group_by_length has no use with --packing True"):
        planner(lengths, packing=True, group_by_length=True)
