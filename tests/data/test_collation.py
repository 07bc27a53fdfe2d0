"""Rows of several samples as one batch."""

import pytest
import torch

from metamorph.data.batching.collation import PackedCollator, PaddedCollator


PAD = 9


def example(length: int, images: int = 0, first: int = 1) -> dict:
    row = {
        "id": f"sample-{length}",
        "input_ids": torch.arange(first, first + length),
        "labels": torch.arange(first, first + length),
        "visual_target_mask": torch.zeros(length, dtype=torch.bool),
    }
    return row | ({"pixel_values": torch.full((images, 3, 2, 2), float(length))} if images else {})


def test_positions_restart_and_first_tokens_are_no_targets() -> None:
    batch = PackedCollator(PAD)([[example(3), example(2, images=1)], [example(4, images=2)]])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 1, 2], [1, 2, 3, 4, PAD]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]]
    assert batch["labels"].tolist() == [[-100, 2, 3, -100, 2], [-100, 2, 3, 4, -100]]
    assert "attention_mask" not in batch  # with one, Transformers would not look for packed rows
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [2, 4, 4]  # in reading order


def test_skipped_examples_are_left_out() -> None:
    """A bad record that was met while training; its row is shorter then, its batch perhaps empty."""
    skipped = {"id": "bad", "skipped": "unreadable_image"}
    batch = PackedCollator(PAD)([[skipped, example(2)], [skipped]])
    assert batch["input_ids"].tolist() == [[1, 2]]
    for rows in ([[skipped]], []):
        empty = PackedCollator(PAD)(rows)
        assert empty["input_ids"].tolist() == [[PAD]]
        assert empty["labels"].tolist() == [[-100]]
        assert empty["position_ids"].tolist() == [[0]]
        assert not empty["visual_target_mask"].any()
    assert PaddedCollator(PAD)([])["attention_mask"].tolist() == [[1]]


def test_a_sample_that_begins_with_an_image_to_draw_is_refused() -> None:
    bad = example(2)
    bad["visual_target_mask"][0] = True
    with pytest.raises(ValueError, match="a sample begins with an image to draw"):
        PackedCollator(PAD)([[example(3), bad]])
