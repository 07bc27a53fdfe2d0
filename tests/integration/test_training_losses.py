"""How losses are normalised and logged, and that batches without one kind of target are harmless."""

import math
from pathlib import Path

import pytest
import torch
from training_parts import arguments, write_records

from metamorph.data.dataset import ConversationDataset
from metamorph.training.assemble import make_plan
from metamorph.training.run import TrainResult, run_training


TEXT_ONLY = [
    {
        "id": f"text-{i}",
        "conversations": [{"from": "human", "value": f"{i}?"}, {"from": "gpt", "value": "Yes." * (i + 1)}],
    }
    for i in range(4)
]


def stage_2(parts: Path, output_dir: Path, **flags: object) -> TrainResult:
    defaults = {"from_scratch_connector": True, "warmup_ratio": 0, "max_steps": 3}
    return run_training(*arguments(parts, output_dir, stage=2, **{**defaults, **flags}))


def lines(result: TrainResult) -> list[dict[str, float]]:
    return [line for line in result.log_history if "text_loss" in line]


def largest_difference(one: TrainResult, other: TrainResult) -> float:
    ours, theirs = one.model.state_dict(), other.model.state_dict()
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


@pytest.fixture(scope="module")
def large_batch(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return stage_2(parts, tmp_path_factory.mktemp("large"), per_device_train_batch_size=4)


@pytest.mark.parametrize(("batch", "accumulation"), [(2, 2), (1, 4)])
def test_r08_accumulated_equals_large_batch(
    batch: int, accumulation: int, parts: Path, large_batch: TrainResult, tmp_path: Path
) -> None:
    flags = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    accumulated = stage_2(parts, tmp_path, **flags)
    assert len(lines(accumulated)) == 3
    for ours, theirs in zip(lines(accumulated), lines(large_batch), strict=True):
        assert ours["num_text_tokens"] == theirs["num_text_tokens"]
        assert ours["num_visual_tokens"] == theirs["num_visual_tokens"] > 0
        for name in ("loss", "text_loss", "visual_loss", "visual_cosine", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], abs=2e-5), name
    assert largest_difference(accumulated, large_batch) < 2e-4  # AdamW divides tiny gradients by themselves


def test_logged_loss_is_the_sum_of_its_kinds(large_batch: TrainResult) -> None:
    for line in lines(large_batch):
        assert line["loss"] == pytest.approx(line["text_loss"] + line["visual_loss"], abs=1e-5)
        assert line["visual_loss"] == pytest.approx(1 - line["visual_cosine"], abs=1e-5)


def test_vision_coef_weighs_the_visual_loss(parts: Path, tmp_path: Path) -> None:
    line = lines(stage_2(parts, tmp_path, vision_coef=0.25, max_steps=1))[0]
    assert line["loss"] == pytest.approx(line["text_loss"] + 0.25 * line["visual_loss"], abs=1e-5)


def test_micro_batch_normalization_is_the_mean_of_means(parts: Path, tmp_path: Path) -> None:
    """With rate 0 nothing moves, so that the micro-batches can be measured one by one."""
    flags = {"learning_rate": 0.0, "loss_normalization": "micro_batch", "per_device_train_batch_size": 1}
    accumulated = lines(stage_2(parts, tmp_path / "a", gradient_accumulation_steps=4, max_steps=1, **flags))[0]
    single = lines(stage_2(parts, tmp_path / "b", max_steps=4, **flags))
    assert accumulated["loss"] == pytest.approx(sum(line["loss"] for line in single) / 4, abs=1e-5)
    tokens = sum(line["num_text_tokens"] for line in single)
    weighted = sum(line["text_loss"] * line["num_text_tokens"] for line in single) / tokens
    assert accumulated["text_loss"] == pytest.approx(weighted, abs=1e-5)  # the log is per token in either mode


def test_r06_logged_losses_are_means_over_the_window(parts: Path, large_batch: TrainResult, tmp_path: Path) -> None:
    window = lines(stage_2(parts, tmp_path, per_device_train_batch_size=4, logging_steps=3))
    each = lines(large_batch)
    assert len(window) == 1
    for kind in ("text", "visual"):
        count = sum(line[f"num_{kind}_tokens"] for line in each)
        total = sum(line[f"{kind}_loss"] * line[f"num_{kind}_tokens"] for line in each)
        assert window[0][f"num_{kind}_tokens"] == count
        assert window[0][f"{kind}_loss"] == pytest.approx(total / count, abs=1e-5)


def test_r01_batches_without_answer_images_equal_text_only_training(parts: Path, tmp_path: Path) -> None:
    data = {"data_path": str(write_records(tmp_path / "text.jsonl", TEXT_ONLY)), "per_device_train_batch_size": 2}
    with_head = stage_2(parts, tmp_path / "ar", use_vision_ar=True, **data)
    without = stage_2(parts, tmp_path / "text", use_vision_ar=False, **data)
    assert [line["loss"] for line in lines(with_head)] == [line["loss"] for line in lines(without)]
    assert all(line["num_visual_tokens"] == 0 and "visual_loss" not in line for line in lines(with_head))
    assert largest_difference(with_head, without) == 0


def test_r01_a_micro_batch_without_answer_image_in_a_step(parts: Path, tmp_path: Path) -> None:
    flags = {"per_device_train_batch_size": 1, "max_steps": 8, "loss_normalization": "micro_batch"}
    result = stage_2(parts, tmp_path, **flags)
    assert {line["num_visual_tokens"] for line in lines(result)} == {0, 4}
    assert all(math.isfinite(line["loss"]) for line in lines(result))
    assert all(torch.isfinite(weight).all() for weight in result.model.state_dict().values())


def test_cut_records_are_reported(parts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = {"data_path": str(write_records(tmp_path / "text.jsonl", TEXT_ONLY)), "per_device_train_batch_size": 4}
    lengths = sorted(len(example["input_ids"]) for example in text_only_dataset(parts, tmp_path))
    with caplog.at_level("INFO", logger="metamorph"):
        result = stage_2(parts, tmp_path / "out", model_max_length=lengths[-2], max_steps=1, **data)
    counts = {"records": 4, "bad": {}, "truncated": 1, "dropped_images": 0}
    assert result.data_statistics == {**counts, "sources": {"text": counts}}
    assert f"4 records, of which 1 cut to --model_max_length {lengths[-2]} (0 images dropped)" in caplog.text


def text_only_dataset(parts: Path, tmp_path: Path) -> ConversationDataset:
    model_args, _, _ = arguments(parts, tmp_path, stage=1)
    return ConversationDataset(tmp_path / "text.jsonl", make_plan(model_args).processor)


def test_r10_a_batch_without_any_target(parts: Path, tmp_path: Path) -> None:
    """A skipped record alone in its batch leaves a row of padding: loss 0, nothing moves, nothing is NaN."""
    records = [TEXT_ONLY[0], {"id": "bad", "conversations": [{"from": "human", "value": "No answer?"}]}]
    data = {"data_path": str(write_records(tmp_path / "bad.jsonl", records)), "max_bad_fraction": 0.5}
    flags = {"on_bad_record": "skip", "per_device_train_batch_size": 1, "max_steps": 2, "image_folder": None}
    result = stage_2(parts, tmp_path / "out", **flags, **data)
    assert result.data_statistics["bad"] == {"unsupervised": 1}
    assert sorted(line["num_text_tokens"] == 0 for line in lines(result)) == [False, True]
    assert min(line["loss"] for line in lines(result)) == 0
    assert all(torch.isfinite(weight).all() for weight in result.model.state_dict().values())


def test_bf16_keeps_float32_weights(parts: Path, large_batch: TrainResult, tmp_path: Path) -> None:
    result = stage_2(parts, tmp_path, per_device_train_batch_size=4, bf16=True)
    assert {weight.dtype for weight in result.model.state_dict().values()} == {torch.float32}
    for ours, theirs in zip(lines(result), lines(large_batch), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=0.05)
        assert ours["loss"] != theirs["loss"]  # it did compute in bfloat16


def test_activation_checkpointing_changes_nothing(parts: Path, large_batch: TrainResult, tmp_path: Path) -> None:
    result = stage_2(parts, tmp_path, per_device_train_batch_size=4, gradient_checkpointing=True)
    assert [line["loss"] for line in lines(result)] == pytest.approx([line["loss"] for line in lines(large_batch)])
    assert largest_difference(result, large_batch) < 1e-5
