"""How losses are normalised and logged, and that batches without one kind of target are harmless."""

import math
from pathlib import Path

import pytest
import torch
from model_parts import build_batch, build_tiny_model
from training_parts import arguments, logged, training_lines, write_records
from transformers import Trainer, TrainingArguments

from metamorph.data.dataset import ConversationDataset
from metamorph.training.build import resolve_model
from metamorph.training.run import TrainResult, run_training


pytestmark = pytest.mark.integration


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
    assert len(training_lines(accumulated)) == 3
    for ours, theirs in zip(training_lines(accumulated), training_lines(large_batch), strict=True):
        assert ours["num_text_tokens"] == theirs["num_text_tokens"]
        assert ours["num_visual_tokens"] == theirs["num_visual_tokens"] > 0
        for name in ("loss", "text_loss", "visual_loss", "visual_cosine", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], abs=2e-5), name
    assert largest_difference(accumulated, large_batch) < 2e-4  # AdamW divides tiny gradients by themselves


def test_logged_loss_is_the_sum_of_its_kinds(large_batch: TrainResult) -> None:
    for line in training_lines(large_batch):
        assert line["loss"] == pytest.approx(line["text_loss"] + line["visual_loss"], abs=1e-5)
        assert line["visual_loss"] == pytest.approx(1 - line["visual_cosine"], abs=1e-5)


def test_vision_coef_weighs_the_visual_loss(parts: Path, tmp_path: Path) -> None:
    line = training_lines(stage_2(parts, tmp_path, vision_coef=0.25, max_steps=1))[0]
    assert line["loss"] == pytest.approx(line["text_loss"] + 0.25 * line["visual_loss"], abs=1e-5)


def test_micro_batch_normalization_is_the_mean_of_means(parts: Path, tmp_path: Path) -> None:
    """With rate 0 nothing moves, so that the micro-batches can be measured one by one."""
    flags = {"learning_rate": 0.0, "loss_normalization": "micro_batch", "per_device_train_batch_size": 1}
    accumulated = training_lines(stage_2(parts, tmp_path / "a", gradient_accumulation_steps=4, max_steps=1, **flags))[0]
    single = training_lines(stage_2(parts, tmp_path / "b", max_steps=4, **flags))
    assert accumulated["loss"] == pytest.approx(sum(line["loss"] for line in single) / 4, abs=1e-5)
    tokens = sum(line["num_text_tokens"] for line in single)
    weighted = sum(line["text_loss"] * line["num_text_tokens"] for line in single) / tokens
    assert accumulated["text_loss"] == pytest.approx(weighted, abs=1e-5)  # the log is per token in either mode


def test_r06_logged_losses_are_means_over_the_window(parts: Path, large_batch: TrainResult, tmp_path: Path) -> None:
    window = training_lines(stage_2(parts, tmp_path, per_device_train_batch_size=4, logging_steps=3))
    each = training_lines(large_batch)
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
    assert logged(with_head) == logged(without)
    assert all(line["num_visual_tokens"] == 0 and "visual_loss" not in line for line in training_lines(with_head))
    assert largest_difference(with_head, without) == 0


def test_r01_a_micro_batch_without_answer_image_in_a_step(parts: Path, tmp_path: Path) -> None:
    flags = {"per_device_train_batch_size": 1, "max_steps": 8, "loss_normalization": "micro_batch"}
    result = stage_2(parts, tmp_path, **flags)
    assert {line["num_visual_tokens"] for line in training_lines(result)} == {0, 4}
    assert all(math.isfinite(line["loss"]) for line in training_lines(result))
    assert all(torch.isfinite(weight).all() for weight in result.model.state_dict().values())


def test_cut_records_are_reported(parts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = {"data_path": str(write_records(tmp_path / "text.jsonl", TEXT_ONLY)), "per_device_train_batch_size": 4}
    lengths = sorted(len(sample["input_ids"]) for sample in text_only_dataset(parts, tmp_path))
    with caplog.at_level("INFO", logger="metamorph"):
        result = stage_2(parts, tmp_path / "out", model_max_length=lengths[-2], max_steps=1, **data)
    counts = {"records": 4, "bad": {}, "truncated": 1, "dropped_images": 0}
    assert result.data_statistics == {**counts, "sources": {"text": counts}}
    assert f"4 records, of which 1 cut to --model_max_length {lengths[-2]} (0 images dropped)" in caplog.text


def text_only_dataset(parts: Path, tmp_path: Path) -> ConversationDataset:
    model_args, _, _ = arguments(parts, tmp_path, stage=1)
    return ConversationDataset(tmp_path / "text.jsonl", resolve_model(model_args).processor)


def test_r10_a_batch_without_any_target(parts: Path, tmp_path: Path) -> None:
    """A skipped record alone in its batch leaves a row of padding: loss 0, nothing moves, nothing is NaN."""
    records = [TEXT_ONLY[0], {"id": "bad", "conversations": [{"from": "human", "value": "No answer?"}]}]
    data = {"data_path": str(write_records(tmp_path / "bad.jsonl", records)), "max_bad_fraction": 0.5}
    flags = {"on_bad_record": "skip", "per_device_train_batch_size": 1, "max_steps": 2, "image_folder": None}
    result = stage_2(parts, tmp_path / "out", **flags, **data)
    assert result.data_statistics["bad"] == {"unsupervised": 1}
    assert sorted(line["num_text_tokens"] == 0 for line in training_lines(result)) == [False, True]
    assert min(line["loss"] for line in training_lines(result)) == 0
    assert all(torch.isfinite(weight).all() for weight in result.model.state_dict().values())


def test_bf16_keeps_float32_weights(parts: Path, large_batch: TrainResult, tmp_path: Path) -> None:
    result = stage_2(parts, tmp_path, per_device_train_batch_size=4, bf16=True)
    assert {weight.dtype for weight in result.model.state_dict().values()} == {torch.float32}
    for ours, theirs in zip(training_lines(result), training_lines(large_batch), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=0.05)
        assert ours["loss"] != theirs["loss"]  # it did compute in bfloat16


def test_activation_checkpointing_changes_nothing(parts: Path, large_batch: TrainResult, tmp_path: Path) -> None:
    result = stage_2(parts, tmp_path, per_device_train_batch_size=4, gradient_checkpointing=True)
    assert logged(result) == pytest.approx(logged(large_batch))
    assert largest_difference(result, large_batch) < 1e-5


def rows_of_unequal_text(kinds: str) -> list[dict[str, torch.Tensor]]:
    """One row for each letter, see `build_batch`; the second supervises one text token less than the first, ...."""
    config = build_tiny_model().config
    rows = []
    for number, kind in enumerate(kinds):
        row = build_batch(config, kind, seed=number)
        supervised = (row["labels"][0] != -100).nonzero().flatten()
        row["labels"][0, supervised[:number]] = -100
        rows.append({name: value for name, value in row.items() if value is not None})
    return rows


def join(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    length = max(row["input_ids"].shape[1] for row in rows)
    batch = {}
    for name in {name for row in rows for name in row}:
        values = [row[name] for row in rows if name in row]
        if name != "pixel_values":
            padding = {"labels": -100}.get(name, 0)
            values = [torch.nn.functional.pad(value, (0, length - value.shape[1]), value=padding) for value in values]
        batch[name] = torch.cat(values)
    return batch


def train_plainly(
    rows: list[dict[str, torch.Tensor]], accumulation: int, folder: Path, seen: list | None = None
) -> Trainer:
    """Two steps of SGD with `transformers.Trainer`, four rows in each; the micro-batches are added to `seen`."""

    def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        batch = join(rows)
        if seen is not None:
            seen.append(batch)
        return batch

    trainer = Trainer(
        build_tiny_model(),
        TrainingArguments(
            str(folder),
            per_device_train_batch_size=4 // accumulation,
            gradient_accumulation_steps=accumulation,
            max_steps=2,
            logging_steps=1,
            optim="sgd",
            learning_rate=0.1,
            lr_scheduler_type="constant",
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            remove_unused_columns=False,
        ),
        data_collator=collate,
        train_dataset=rows,
    )
    trainer.train()
    return trainer


def test_plain_trainer_text_loss_does_not_depend_on_accumulation(tmp_path: Path) -> None:
    rows = rows_of_unequal_text("vtvt")
    runs = [train_plainly(rows, accumulation, tmp_path / str(accumulation)) for accumulation in (1, 2, 4)]
    first, *others = [[line for line in run.state.log_history if "loss" in line] for run in runs]
    for lines_of_run in others:
        for ours, theirs in zip(lines_of_run, first, strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    expected = runs[0].model.state_dict()
    initial = build_tiny_model().state_dict()
    assert any(not torch.equal(expected[name], initial[name]) for name in expected)
    for run in runs[1:]:
        torch.testing.assert_close(dict(run.model.state_dict()), dict(expected), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_plain_trainer_weighs_visual_losses_by_share_of_text(accumulation: int, tmp_path: Path) -> None:
    """The number of visual targets of the full step is only known to `MetaMorphTrainer`."""
    micro_batches: list[dict[str, torch.Tensor]] = []
    trainer = train_plainly(rows_of_unequal_text("gmgt"), accumulation, tmp_path, micro_batches)
    logged = next(line["loss"] for line in trainer.state.log_history if "loss" in line)
    outputs = [build_tiny_model()(**batch) for batch in micro_batches[:accumulation]]
    tokens = sum(output.num_text_tokens for output in outputs)
    expected = sum(output.loss * output.num_text_tokens / tokens for output in outputs)
    assert logged == pytest.approx(expected.item(), rel=1e-4)
