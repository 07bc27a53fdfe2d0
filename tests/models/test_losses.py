"""Sums, counts and normalizers of the two losses."""

import pytest
import torch

from metamorph.models.losses import LossSum, average, cosine_sum, direction_sums, text_loss, visual_loss


def test_text_loss_is_a_sum_with_its_count():
    logits, labels = torch.randn(5, 7), torch.tensor([0, 3, 6, 1, 2])
    loss = text_loss(logits, labels)
    assert loss.count == 5
    torch.testing.assert_close(loss.sum / 5, torch.nn.functional.cross_entropy(logits, labels))


def test_perfect_predictions_cost_nothing():
    targets = torch.nn.functional.normalize(torch.randn(3, 8), dim=-1)
    loss = visual_loss(4.2 * targets, targets, normalize=True, apply_softmax=False)
    assert loss.sum.item() == pytest.approx(0.0, abs=1e-6)
    assert cosine_sum(4.2 * targets, targets).item() == pytest.approx(3.0, abs=1e-6)
    assert visual_loss(-targets, targets, normalize=True, apply_softmax=False).sum.item() == pytest.approx(
        6.0, abs=1e-5
    )


def test_no_constant_has_a_larger_cosine_than_the_direction_of_the_sum():
    generator = torch.Generator().manual_seed(0)
    targets, places = torch.randn(40, 8, generator=generator) + 1, torch.arange(40) % 4
    sums = direction_sums(targets, places, 5)
    assert sums.shape == (5, 8)
    assert not sums[4].any()
    for place in range(4):
        own = targets[places == place]
        best = cosine_sum(sums[place].expand_as(own), own)
        torch.testing.assert_close(best, sums[place].norm())
        for other in (own.mean(dim=0), sums[place] + 0.1 * torch.randn(8, generator=generator)):
            assert cosine_sum(other.expand_as(own), own) <= best + 1e-6


def test_half_precision_is_summed_in_float32():
    predictions = torch.randn(4, 8).bfloat16()
    assert visual_loss(predictions, predictions, normalize=False, apply_softmax=False).sum.dtype == torch.float32
    assert text_loss(predictions, torch.zeros(4, dtype=torch.long)).sum.dtype == torch.float32


@pytest.mark.parametrize(("normalizer", "expected"), [(None, 2.0), (4, 1.5), (0.5, 12.0), (torch.tensor(0.5), 12.0)])
def test_average(normalizer, expected):
    """A normalizer below 1 occurs with one token in a step of two ranks; it must not be rounded up."""
    assert average(LossSum(torch.tensor(6.0), torch.tensor(3)), normalizer) == expected


@pytest.mark.parametrize("normalizer", [None, 0, torch.tensor(0)])
def test_r01_empty_average_is_exactly_zero(normalizer):
    assert average(LossSum(torch.tensor(0.0), torch.tensor(0)), normalizer) == 0.0
