"""Training on packed rows: the same losses, every sample once, resumed at the very next sample."""

from pathlib import Path

import pytest
import torch
from packing_parts import KillAfter, Killed, recorded
from training_parts import arguments, training_lines

from metamorph.training.run import TrainResult, run_training


pytestmark = pytest.mark.integration


NUM_SAMPLES = 12
EXACT = ("loss", "text_loss", "visual_loss", "grad_norm", "learning_rate", "epoch")


def train(parts: Path, output_dir: Path, callbacks: list | None = None, **flags: object) -> TrainResult:
    defaults = {"from_scratch_connector": True, "packing": True, "model_max_length": 128, "seed": 5}
    return run_training(*arguments(parts, output_dir, stage=2, **{**defaults, **flags}), callbacks=callbacks)


def test_packed_training_equals_padded_training(parts: Path, tmp_path: Path) -> None:
    """Steps of all samples, so that both see the same: losses, gradients and the weights that come out of them."""
    flags = {"max_steps": 2, "learning_rate": 1e-3, "warmup_ratio": 0, "per_device_train_batch_size": NUM_SAMPLES}
    with recorded() as packed_steps:
        packed = train(parts, tmp_path / "packed", **flags)
    with recorded() as padded_steps:
        padded = train(parts, tmp_path / "padded", packing=False, **flags)
    assert [sorted(step) for step in packed_steps] == [sorted(step) for step in padded_steps]
    for ours, theirs in zip(training_lines(packed), training_lines(padded), strict=True):
        assert ours["num_text_tokens"] == theirs["num_text_tokens"]
        assert ours["num_visual_tokens"] == theirs["num_visual_tokens"] > 0
        for name in ("loss", "text_loss", "visual_loss", "visual_cosine", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], abs=2e-5), name
    weights = padded.model.state_dict()
    for name, weight in packed.model.state_dict().items():
        torch.testing.assert_close(weight, weights[name], atol=2e-4, rtol=0)


RUN = {"num_train_epochs": 3, "max_steps": -1, "save_strategy": "steps", "save_steps": 2}
"""Steps of two micro-batches of one row; an epoch ends in the middle of a step."""


def flags_of(packing: bool) -> dict[str, object]:
    return {**RUN, "packing": packing, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}


@pytest.mark.parametrize("packing", [True, False])
def test_a_killed_run_resumes_at_the_next_sample(packing: bool, parts: Path, tmp_path: Path) -> None:
    """Also when it is resumed with another number of workers, and in the second epoch."""
    with recorded() as expected:
        uninterrupted = train(parts, tmp_path / "uninterrupted", **flags_of(packing))
    steps = len(expected) // 3
    for epoch in range(3):
        seen = [number for step in expected[epoch * steps : (epoch + 1) * steps] for number in step]
        assert sorted(seen) == list(range(NUM_SAMPLES))
    assert expected[:steps] != expected[steps : 2 * steps]

    killed_at = steps + 3
    saved = (killed_at - 1) // 2 * 2  # a step is saved after it has ended
    assert steps < saved < 2 * steps  # in the second epoch
    with recorded() as first, pytest.raises(Killed):
        train(parts, tmp_path / "cut", callbacks=[KillAfter(killed_at)], **flags_of(packing))
    assert first == expected[:killed_at]
    with recorded() as rest:
        resumed = train(parts, tmp_path / "cut", dataloader_num_workers=2, **flags_of(packing))
    assert rest == expected[saved:]
    for ours, theirs in zip(training_lines(resumed)[saved:], training_lines(uninterrupted)[saved:], strict=True):
        assert {name: ours.get(name) for name in EXACT} == {name: theirs.get(name) for name in EXACT}
    weights = uninterrupted.model.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in resumed.model.state_dict().items())


def test_r24_grouping_by_length_trains_on_samples_of_similar_length(parts: Path, tmp_path: Path) -> None:
    flags = {"packing": False, "group_by_length": True, "per_device_train_batch_size": 3, "max_steps": 4}
    with recorded() as steps:
        result = train(parts, tmp_path, **flags)
    assert sorted(number for step in steps for number in step) == list(range(NUM_SAMPLES))
    # Of the four kinds of records in turn, text (3) is the longest and questions about an image (0) the shortest.
    kinds = [{number % 4 for number in step} for step in steps]
    assert kinds[0] == {3}  # the longest come first
    assert {0} in kinds
    assert len(training_lines(result)) == 4


def test_what_cannot_be_combined_is_refused(parts: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="group_by_length has no use with --packing True"):
        train(parts, tmp_path, group_by_length=True)
    with pytest.raises(ValueError, match="--train_sampling_strategy 'batch_rebalance' is unknown"):
        train(parts, tmp_path, train_sampling_strategy="batch_rebalance")
    with pytest.raises(ValueError, match="--dataloader_drop_last True is not supported"):
        train(parts, tmp_path, dataloader_drop_last=True)


def test_the_packing_is_reported(parts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="metamorph"):
        train(parts, tmp_path, max_steps=1)
    assert f"packing: {NUM_SAMPLES} samples in " in caplog.text
    assert " rows of 128 tokens" in caplog.text
