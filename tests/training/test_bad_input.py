"""Bad input of `metamorph train`: one line that names the thing and the mend, before any weight is loaded.

That it comes before is shown by taking the weights away: the language model here has none.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from training_parts import NUM_IMAGE_TOKENS, write_records

from metamorph import cli
from metamorph.runs.lock import only_run_in


pytestmark = pytest.mark.integration


@pytest.fixture
def bare(parts: Path, tmp_path: Path) -> Path:
    """A copy of the parts without any weights."""
    folder = tmp_path / "bare"
    shutil.copytree(parts, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def train(folder: Path, capsys: pytest.CaptureFixture[str], **flags: object) -> str:
    """Run the command, which must fail with status 2; returns what it printed to stderr."""
    values = {
        "model_name_or_path": folder / "llm",
        "vision_tower": folder / "tower",
        "data_path": folder / "data.jsonl",
        "image_folder": folder / "images",
        "output_dir": folder / "out",
        "num_image_tokens": NUM_IMAGE_TOKENS,
        "tune_mm_mlp_adapter": True,
        "max_steps": 1,
        **flags,
    }
    words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    assert cli.main(["train", *words]) == 2
    message = capsys.readouterr().err
    assert "metamorph train: error: " in message
    assert "Traceback" not in message
    return message


def test_weights_are_what_is_missing_when_the_rest_is_right(bare: Path, capsys) -> None:
    assert "--model_name_or_path" in (message := train(bare, capsys))
    assert "model.safetensors" in message


def test_validation_data_without_their_folder_name_the_flag_that_lacks(bare: Path, capsys) -> None:
    shutil.copy(bare / "data.jsonl", bare / "eval.jsonl")
    message = train(bare, capsys, eval_data_path=bare / "eval.jsonl", eval_strategy="steps", eval_steps=1)
    assert f"so --eval_image_folder {bare} is wrong" in message
    assert "--image_folder" not in message
    (bare / "mixture.yaml").write_text(f"[{{path: {bare}/eval.jsonl, image_folder: {bare}, name: odd}}]")
    message = train(bare, capsys, eval_data_path=bare / "mixture.yaml", eval_strategy="steps", eval_steps=1)
    assert f"mixture.yaml, source odd: image_folder {bare} is wrong" in message


def test_media_that_nobody_reads_stop_a_run_before_weights_are_loaded(bare: Path, capsys) -> None:
    turns = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A cat."}]
    write_records(bare / "data.jsonl", [{"id": "r", "images": ["0.png"], "conversations": turns}])
    message = train(bare, capsys)
    assert "data.jsonl:1 (id 'r'): \"images\": ['0.png'] looks like media, but is not read" in message
    assert "fields: {image: images}" in message


def test_missing_model_folder(bare: Path, capsys) -> None:
    message = train(bare, capsys, model_name_or_path=bare / "nowhere")
    assert f"--model_name_or_path {bare / 'nowhere'} does not exist" in message


def test_unknown_hub_id(bare: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = train(bare, capsys, model_name_or_path="metamorph-tests/does-not-exist")
    assert "--model_name_or_path metamorph-tests/does-not-exist is neither a local folder" in message


def test_language_model_without_chat_template(bare: Path, capsys) -> None:
    config = bare / "llm" / "tokenizer_config.json"
    config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "chat_template"}))
    (bare / "llm" / "chat_template.jinja").unlink(missing_ok=True)
    message = train(bare, capsys, version="auto")
    assert "chat template" in message
    assert "--version" in message


def test_language_model_without_tokenizer(bare: Path, capsys) -> None:
    for file in bare.glob("llm/*token*"):
        file.unlink()
    assert "--model_name_or_path" in train(bare, capsys)


def test_tower_with_unknown_layout(bare: Path, capsys) -> None:
    (bare / "tower" / "config.json").write_text(json.dumps({"model_type": "resnet"}))
    message = train(bare, capsys)
    assert "--vision_tower" in message
    assert "resnet" in message
    assert "siglip_vision_model" in message


def test_tower_without_image_processor(bare: Path, capsys) -> None:
    (bare / "tower" / "preprocessor_config.json").unlink()
    assert f"--vision_tower {bare / 'tower'}" in train(bare, capsys)


def test_image_that_does_not_exist(bare: Path, capsys) -> None:
    (bare / "images" / "3.png").unlink()
    message = train(bare, capsys)
    assert "3.png" in message
    assert "--image_folder" in message


def test_wrong_image_folder(bare: Path, capsys) -> None:
    (bare / "empty").mkdir()
    message = train(bare, capsys, image_folder=bare / "empty")
    assert f"--image_folder {bare / 'empty'} is wrong" in message


def test_broken_line(bare: Path, capsys) -> None:
    lines = (bare / "data.jsonl").read_text().splitlines()
    lines[4] = lines[4][:30]
    (bare / "data.jsonl").write_text("\n".join(lines))
    message = train(bare, capsys)
    assert "data.jsonl:5" in message
    assert "--on_bad_record skip" in message


def test_empty_data(bare: Path, capsys) -> None:
    assert "has no records" in train(bare, capsys, data_path=write_records(bare / "none.jsonl", []))


def test_token_count_that_is_not_a_square(bare: Path, capsys) -> None:
    message = train(bare, capsys, num_image_tokens=6)
    assert "--num_image_tokens=6 is not a square number" in message
    assert "4 and 9" in message


def test_stage_2_without_connector(bare: Path, capsys) -> None:
    message = train(bare, capsys, tune_mm_mlp_adapter=False)
    assert "has no connector" in message
    assert "--pretrain_mm_mlp_adapter" in message


def test_file_that_is_no_connector(bare: Path, capsys) -> None:
    file = bare / "mm_projector.safetensors"
    save_file({"model.norm.weight": torch.ones(2)}, file)
    message = train(bare, capsys, tune_mm_mlp_adapter=False, pretrain_mm_mlp_adapter=file)
    assert f"--pretrain_mm_mlp_adapter {file} cannot be used" in message
    assert "it is not a connector of stage 1" in message


def test_connector_folder_without_connector(bare: Path, capsys) -> None:
    message = train(bare, capsys, tune_mm_mlp_adapter=False, pretrain_mm_mlp_adapter=bare / "images")
    assert f"no connector at {bare / 'images'}" in message


def test_evaluation_without_validation_data(bare: Path, capsys) -> None:
    message = train(bare, capsys, evaluation_strategy="steps", eval_steps=5)
    assert "--eval_strategy steps needs validation data" in message


def validation(folder: Path, **flags: object) -> dict[str, object]:
    data = {"eval_data_path": folder / "data.jsonl", "eval_image_folder": folder / "images"}
    return {**data, "eval_strategy": "steps", "eval_steps": 5, **flags}


@pytest.mark.parametrize("name", ["accuracy", "eval_text_los", "visual_cosine"])  # stage 1 has no visual loss
def test_metric_that_is_not_measured(name: str, bare: Path, capsys) -> None:
    message = train(bare, capsys, **validation(bare, metric_for_best_model=name))
    assert f"--metric_for_best_model {name} is not measured" in message
    assert "Use one of eval_loss, eval_text_loss, " in message
    assert "eval_data_text_loss" not in message  # a single source is all of them
    assert "eval_visual_loss" not in message  # stage 1 has no visual loss


@pytest.mark.parametrize("name", ["loss", "eval_text_loss"])
def test_metric_that_is_measured(name: str, bare: Path, capsys) -> None:
    assert "model.safetensors" in train(bare, capsys, **validation(bare, metric_for_best_model=name))


def test_output_folder_that_cannot_be_written_to(bare: Path, capsys) -> None:
    folder = bare / "data.jsonl" / "out"
    assert f"--output_dir {folder} cannot be written to" in train(bare, capsys, output_dir=folder)


def test_output_folder_of_another_run(bare: Path, capsys) -> None:
    with only_run_in(bare / "out"):
        message = train(bare, capsys)
    assert f"--output_dir {bare / 'out'} is used by another run: host " in message
    assert f"process {os.getpid()}" in message


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"vision_lr": 1e-5}, "--vision_lr 1e-05 has no effect: that module is not trained. Add --freeze_vision False"),
        ({"vision_head_lr": 1e-5}, "--vision_head_lr 1e-05 has no effect: that module is not trained. Add --use_vis"),
        (
            {"tune_mm_mlp_adapter": False, "from_scratch_connector": True}
            | {"freeze_mm_mlp_adapter": True, "mm_projector_lr": 1e-5},
            "--mm_projector_lr 1e-05 has no effect: that module is not trained. Add --freeze_mm_mlp_adapter False",
        ),
        (
            {"optim_args": "momentum=0.9"},
            "--optim_args momentum=0.9 cannot be used: it has no effect with --optim ad",
        ),
        ({"optim": "sgd", "optim_args": "fast"}, "--optim_args fast cannot be used"),
        ({"optim": "grokadamw"}, "--optim grokadamw cannot be used: Please install grokadamw"),
    ],
)
def test_flags_of_the_optimizer(flags: dict[str, object], message: str, bare: Path, capsys) -> None:
    assert message in train(bare, capsys, **flags)


def test_arguments_of_the_optimizer_that_act(bare: Path, capsys) -> None:
    assert "model.safetensors" in train(bare, capsys, optim="sgd", optim_args="momentum=0.9")


def test_output_of_stage_1_as_model(bare: Path, capsys) -> None:
    stage_1 = bare / "stage1"
    stage_1.mkdir()
    (stage_1 / "config.json").write_text(json.dumps({"model_type": "metamorph"}))
    message = train(bare, capsys, tune_mm_mlp_adapter=False, model_name_or_path=stage_1)
    assert "pass it as --pretrain_mm_mlp_adapter" in message
