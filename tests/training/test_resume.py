"""Resumed equals uninterrupted, and what a run resumes from."""

import json
import shutil
from datetime import datetime, tzinfo
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from training_parts import arguments, logged, make_language_model, training_lines
from transformers import AutoConfig, AutoTokenizer, TrainerCallback

from metamorph.models.connector import CONNECTOR_FILE
from metamorph.models.sequence import template_date
from metamorph.runs.checkpoint_files import MANIFEST_FILE, CheckpointError
from metamorph.training.build import resolve_model
from metamorph.training.checkpoints.resume import find_stage_checkpoint
from metamorph.training.run import TrainResult, run_training


pytestmark = pytest.mark.integration


EXACT = ("loss", "text_loss", "visual_loss", "visual_cosine", "grad_norm", "learning_rate", "epoch")
STEPS = 5
"""Of two micro-batches of two: an epoch of 12 samples ends after step 3."""


def flags_of(stage: int) -> dict[str, object]:
    flags = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
    return flags if stage == 1 else {**flags, "from_scratch_connector": True}


@pytest.fixture(scope="module", params=[1, 2])
def uninterrupted(request: pytest.FixtureRequest, parts: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    folder = tmp_path_factory.mktemp("uninterrupted")
    return run_training(*arguments(parts, folder, stage=request.param, **flags_of(request.param)))


def assert_same_end(resumed: TrainResult, uninterrupted: TrainResult, first_step: int) -> None:
    ours, theirs = (training_lines(r) for r in (resumed, uninterrupted))
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == [1, 2, 3, 4, 5]
    for mine, other in zip(ours[first_step:], theirs[first_step:], strict=True):
        assert {k: mine.get(k) for k in EXACT} == {k: other.get(k) for k in EXACT}
    weights = uninterrupted.model.state_dict()
    for name, weight in resumed.model.state_dict().items():
        assert torch.equal(weight, weights[name]), name


def test_resumed_equals_uninterrupted(parts: Path, uninterrupted: TrainResult, tmp_path: Path) -> None:
    stage = uninterrupted.stage
    checkpoint = Path(uninterrupted.output_dir) / "checkpoint-2"
    flags = {**flags_of(stage), "resume_from_checkpoint": str(checkpoint)}
    resumed = run_training(*arguments(parts, tmp_path, stage=stage, **flags))
    assert_same_end(resumed, uninterrupted, first_step=2)


def test_r25_the_same_command_again_resumes(parts: Path, uninterrupted: TrainResult, tmp_path: Path) -> None:
    """As a requeued job does: same flags, same output_dir. A checkpoint cut off while it was written is passed over."""
    stage = uninterrupted.stage
    shutil.copytree(uninterrupted.output_dir, tmp_path, dirs_exist_ok=True)
    for weights in (*tmp_path.glob("checkpoint-5/model*"), *tmp_path.glob(f"checkpoint-5/{CONNECTOR_FILE}")):
        weights.unlink()
    assert find_stage_checkpoint(str(tmp_path), None, stage) == str(tmp_path / "checkpoint-4")
    resumed = run_training(*arguments(parts, tmp_path, stage=stage, **flags_of(stage)))
    assert_same_end(resumed, uninterrupted, first_step=4)


def test_a_finished_run_is_not_trained_further(parts: Path, uninterrupted: TrainResult, tmp_path: Path) -> None:
    stage = uninterrupted.stage
    shutil.copytree(uninterrupted.output_dir, tmp_path, dirs_exist_ok=True)
    again = run_training(*arguments(parts, tmp_path, stage=stage, **flags_of(stage)))
    assert again.global_step == STEPS
    assert_same_end(again, uninterrupted, first_step=STEPS)


def test_a_run_keeps_the_day_on_which_it_began(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a template that prints the date, the ids of a record would be others on another day."""

    class Clock(datetime):
        day = 1

        @classmethod
        def now(cls, tz: tzinfo | None = None) -> "Clock":
            return cls(2026, 5, cls.day)

    monkeypatch.setattr(template_date, "datetime", Clock)
    model = make_language_model(tmp_path / "llm")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = (
        "{{ bos_token + strftime_now('%B %d') }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}"
        "<|end_header_id|>{{ m['content'] }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{% endif %}"
    )
    tokenizer.save_pretrained(model)
    flags = {"stage": 1, "version": "auto", "model_name_or_path": str(model)}
    saving = {"save_strategy": "steps", "save_steps": 1}
    for day, steps in ((1, 1), (2, 2)):
        Clock.day = day
        result = run_training(*arguments(parts, tmp_path / "run", max_steps=steps, **flags, **saving))
        assert result.processor.apply_chat_template([{"role": "user", "content": "Hi"}]).startswith(
            "<|begin_of_text|>May 01<|start_header_id|>"
        )
    assert result.global_step == 2
    other = arguments(parts, tmp_path / "other", max_steps=1, **flags)
    assert "May 02" in run_training(*other).processor.chat_template

    # A run has one date: that of its first process.
    shared: list[object] = []

    def broadcast(values: list[object]) -> None:
        if shared:
            values[:] = shared
        shared[:] = values

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "broadcast_object_list", broadcast)
    templates = []
    for rank in (0, 1):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        Clock.day = 3 + rank
        templates.append(resolve_model(other[0]).processor.chat_template)
    assert templates[0] == templates[1]
    assert "May 03" in templates[0]


def test_bf16_resumes_with_float32_weights(parts: Path, tmp_path: Path) -> None:
    """The frozen tower, which holds the model's first weights, is in bfloat16 then; all that is trained is not."""
    flags = {"stage": 2, "from_scratch_connector": True, "bf16": True, "max_steps": 2, "save_strategy": "steps"}
    uninterrupted = run_training(*arguments(parts, tmp_path / "uninterrupted", save_steps=1, **flags))
    checkpoint = tmp_path / "uninterrupted" / "checkpoint-1"
    resumed = run_training(*arguments(parts, tmp_path / "end", resume_from_checkpoint=str(checkpoint), **flags))
    weights = uninterrupted.model.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in resumed.model.state_dict().items())
    for folder in (checkpoint, tmp_path / "end"):
        assert AutoConfig.from_pretrained(folder).dtype == torch.float32


def test_r25_checkpoints_hold_the_optimizer(uninterrupted: TrainResult) -> None:
    checkpoint = Path(uninterrupted.output_dir) / "checkpoint-4"
    names = {file.name for file in checkpoint.iterdir()}
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= names
    assert (CONNECTOR_FILE in names) == (uninterrupted.stage == 1)
    assert ("model.safetensors" in names) == (uninterrupted.stage == 2)
    assert "training_args.bin" not in names  # a pickle


def test_what_a_run_resumes_from(uninterrupted: TrainResult, tmp_path: Path) -> None:
    folder, stage = uninterrupted.output_dir, uninterrupted.stage
    newest = f"{folder}/checkpoint-{STEPS}"
    assert find_stage_checkpoint(folder, None, stage) == newest
    assert find_stage_checkpoint(folder, "True", stage) == newest
    assert find_stage_checkpoint(folder, "False", stage) is None
    assert find_stage_checkpoint(str(tmp_path), None, stage) is None
    with pytest.raises(FileNotFoundError, match="there is no checkpoint in --output_dir"):
        find_stage_checkpoint(str(tmp_path), "True", stage)
    with pytest.raises(FileNotFoundError, match="--resume_from_checkpoint /nowhere is not a complete checkpoint"):
        find_stage_checkpoint(folder, "/nowhere", stage)
    with pytest.raises(ValueError, match="give each stage its own --output_dir"):
        find_stage_checkpoint(folder, None, 3 - stage)


class Groups(TrainerCallback):
    """The optimizer's groups at the end of a step, by name."""

    def __init__(self) -> None:
        self.seen: list[dict[str, dict[str, Any]]] = []

    def on_step_end(self, *args: Any, optimizer: Any, **kwargs: Any) -> None:
        self.seen.append({group["name"]: dict(group) for group in optimizer.param_groups})


@pytest.fixture(scope="module")
def stage_2(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint after step 2 of 5, with a warm-up of 4 steps."""
    folder = tmp_path_factory.mktemp("stage_2")
    run_training(*arguments(parts, folder, stage=2, **flags_of(2), warmup_steps=4))
    return folder / "checkpoint-2"


def resume(parts: Path, checkpoint: Path | None, folder: Path, **flags: object) -> tuple[TrainResult, Groups]:
    groups = Groups()
    values = {**flags_of(2), "warmup_steps": 4, "resume_from_checkpoint": str(checkpoint), **flags}
    return run_training(*arguments(parts, folder, stage=2, **values), callbacks=[groups]), groups


def test_changed_rates_and_decay_act(
    parts: Path, stage_2: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As if the entire run had had them: the schedule continues, from the new peaks."""
    flags = {"learning_rate": 1e-3, "mm_projector_lr": 1e-4, "weight_decay": 0.25, "adam_beta2": 0.5}
    result, groups = resume(parts, stage_2, tmp_path, **flags)
    lines = training_lines(result)
    for step, rate in ((3, 1e-3 * 2 / 4), (4, 1e-3 * 3 / 4), (5, 1e-3)):  # logged are the rates of the step itself
        assert lines[step - 1]["lr_language_model"] == pytest.approx(rate)
        assert lines[step - 1]["lr_mm_projector"] == pytest.approx(rate / 10)
    decay = {name: group["weight_decay"] for name, group in groups.seen[0].items()}
    assert decay["language_model"] == 0.25
    assert decay["language_model_no_decay"] == 0
    assert groups.seen[0]["vision_head"]["betas"] == (0.9, 0.5)
    assert "--learning_rate 0.01 there, 0.001 here; --mm_projector_lr None there, 0.0001 here" in caplog.text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"vision_coef": 0.1}, "--vision_coef 1.0 there, 0.1 here.*--allow_changes vision_coef"),
        ({"loss_normalization": "micro_batch"}, "--loss_normalization global there, micro_batch here"),
        (
            {"lr_scheduler_type": "linear", "warmup_steps": 2},
            "lr_scheduler_type cosine there, linear here; --warmup_steps 4 .*lr_scheduler_type warmup_steps",
        ),
        ({"optim": "sgd"}, "--optim adamw_torch_fused there, sgd here. Restore them, or start a new run"),
        ({"freeze_mm_mlp_adapter": True}, "--freeze_mm_mlp_adapter False there, True here"),
        ({"freeze_vision": False}, "--freeze_vision True there, False here"),
        ({"use_vision_ar": False}, "--use_vision_ar True there, False here"),
        ({"mm_vision_select_layer": -2}, "--mm_vision_select_layer -1 there, -2 here"),
        (
            {"allow_changes": ["vision_coef", "lr_scheduler_type"], "lr_scheduler_type": "reduce_lr_on_plateau"},
            "--lr_scheduler_type cosine there, reduce_lr_on_plateau here. Restore them, or start",
        ),
    ],
)
def test_other_changes_are_refused(
    parts: Path, stage_2: Path, tmp_path: Path, flags: dict[str, object], message: str
) -> None:
    if flags.get("lr_scheduler_type") == "reduce_lr_on_plateau":
        evaluation = {"eval_data_path": str(parts / "data.jsonl"), "eval_image_folder": str(parts / "images")}
        flags = {**flags, **evaluation, "eval_strategy": "steps", "warmup_steps": 0}
    with pytest.raises(CheckpointError, match=message):
        resume(parts, stage_2, tmp_path, **flags)


def test_another_base_of_the_same_name_is_refused(
    parts: Path, stage_2: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Results of stages are often called the same; frozen weights are not in the checkpoint."""
    flags = {"model_name_or_path": str(tmp_path / "llm"), "max_steps": 2, "packing": False}
    checkpoint = tmp_path / "run" / "checkpoint-2"
    shutil.copytree(parts / "llm", tmp_path / "llm")
    resume(parts, None, tmp_path / "run", **flags)
    resume(parts, checkpoint, tmp_path / "again", **flags | {"model_name_or_path": str(parts / "llm")})
    resume(parts, checkpoint, tmp_path / "again", **flags, model_max_length=100)
    assert "--model_max_length 4096 there, 100 here" in caplog.text
    weights = load_file(tmp_path / "llm" / "model.safetensors")
    save_file({name: weight + 1 for name, weight in weights.items()}, tmp_path / "llm" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"--model_name_or_path llm crc32:.* there, llm crc32:.* here"):
        resume(parts, checkpoint, tmp_path / "again", **flags)


def test_confirmed_changes_act(parts: Path, stage_2: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    flags = {"vision_coef": 0.5, "lr_scheduler_type": "constant_with_warmup", "max_steps": 6}
    allowed = {"allow_changes": ["vision_coef", "lr_scheduler_type"]}
    result, _ = resume(parts, stage_2, tmp_path, **flags, **allowed)
    third = next(line for line in result.log_history if line.get("step") == 3)
    assert third["loss"] == pytest.approx(third["text_loss"] + 0.5 * third["visual_loss"], rel=1e-4)
    rates = logged(result, "learning_rate")
    assert rates[3:] == pytest.approx([1e-2 * 3 / 4, 1e-2, 1e-2])
    assert result.global_step == 6
    assert "the learning rate schedule now ends with this run" in caplog.text
    # What is resumed next was trained with them.
    resume(parts, tmp_path / "checkpoint-4", tmp_path / "again", **flags)


def test_checkpoints_of_earlier_versions(
    parts: Path, stage_2: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They do not record the flags, but contain the arguments of the trainer and the configuration of the model."""
    old = tmp_path / "old"
    shutil.copytree(stage_2, old)
    manifest = json.loads((old / MANIFEST_FILE).read_text())
    del manifest["flags"]
    (old / MANIFEST_FILE).write_text(json.dumps(manifest))
    for flags in ({"optim": "sgd"}, {"vision_coef": 0.1}):
        with pytest.raises(CheckpointError, match=f"--{next(iter(flags))}"):
            resume(parts, old, tmp_path / "out", **flags)
    caplog.set_level("INFO", "metamorph")
    resume(parts, old, tmp_path / "out")
    assert "does not record its value of" in caplog.text
    assert "--freeze_backbone" in caplog.text
