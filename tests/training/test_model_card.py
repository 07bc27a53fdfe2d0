"""The model card in every result folder, and what reaches the Hub with it."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub import HfApi
from training_parts import arguments, training_lines

import metamorph
from metamorph.training.reporting.model_card import CARD_FILE
from metamorph.training.run import TrainResult, run_training


pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def stage_1(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return run_training(*arguments(parts, tmp_path_factory.mktemp("card"), stage=1, max_steps=2))


def read_card(folder: str | Path) -> tuple[dict, str]:
    """The metadata and the text of a card."""
    _, metadata, text = (Path(folder) / CARD_FILE).read_text().split("---\n", 2)
    return yaml.safe_load(metadata), text


def test_the_card_states_data_recipe_and_metrics(parts: Path, stage_1: TrainResult) -> None:
    metadata, text = read_card(stage_1.output_dir)
    assert metadata["library_name"] == "metamorph"
    assert "base_model" not in metadata  # local folders, which the Hub does not know
    assert "| `data` | 12 records, 0 cut, 0 skipped |" in text
    assert "| `learning_rate` | 0.01 |" in text
    assert "| `lr_scheduler_type` | cosine |" in text
    assert f"| `metamorph` | {metamorph.__version__} |" in text
    assert "Metrics after 2 steps" in text
    last = training_lines(stage_1)[-1]
    assert f"| `text_loss` | {last['text_loss']:.4g} |" in text
    assert "--pretrain_mm_mlp_adapter" in text
    assert str(parts) not in text  # no path of this machine


def test_names_in_a_card_are_no_markdown(parts: Path, tmp_path: Path) -> None:
    """Names of data may be untrusted."""
    name = "d`<img src=x>`|\x1b[31m[a](b)"
    mixture = [{"path": str(parts / "data.jsonl"), "image_folder": str(parts / "images"), "name": name}]
    (tmp_path / "mixture.yaml").write_text(yaml.safe_dump(mixture, allow_unicode=False))
    flags = {"data_path": str(tmp_path / "mixture.yaml"), "image_folder": None, "data_license": "<b>`x`"}
    run_training(*arguments(parts, tmp_path / "out", stage=1, max_steps=1, **flags))
    _, text = read_card(tmp_path / "out")
    assert r"| `d'<img src=x>'\|\x1b[31m[a](b)` | 12 records" in text
    assert r"Training data: \<b\>\`x\`" in text


def test_licences_are_unknown_unless_given(parts: Path, stage_1: TrainResult, tmp_path: Path) -> None:
    metadata, text = read_card(stage_1.output_dir)
    assert metadata["license"] == "unknown"
    assert text.count("unknown (not given to the training command") == 2
    flags = {"max_steps": 1, "model_license": "apache-2.0", "data_license": "cc-by-4.0"}
    run_training(*arguments(parts, tmp_path, stage=1, **flags))
    metadata, text = read_card(tmp_path)
    assert metadata["license"] == "apache-2.0"
    assert "This result: apache-2.0" in text
    assert "Training data: cc-by-4.0" in text


def test_what_is_pushed_is_complete(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The network is replaced, and the folder is inspected when it would be uploaded."""
    pushed: list[tuple[str, set[str]]] = []

    def create_repo(self: HfApi, name: str, **kwargs: object) -> SimpleNamespace:
        return SimpleNamespace(repo_id=name)

    def upload_folder(self: HfApi, *, repo_id: str, folder_path: str, **kwargs: object) -> SimpleNamespace:
        pushed.append((repo_id, {file.name for file in Path(folder_path).iterdir()}))
        return SimpleNamespace()

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    flags = {"push_to_hub": True, "hub_model_id": "somebody/tiny", "max_steps": 2, "from_scratch_connector": True}
    lora = {"lora_enable": True, "lora_r": 2, "save_strategy": "steps", "save_steps": 1}
    run_training(*arguments(parts, tmp_path, stage=2, **flags, **lora))
    assert [repo for repo, _ in pushed] == ["somebody/tiny"]  # once, at the end
    assert {
        CARD_FILE,
        "adapter_model.safetensors",
        "metamorph_adapter.json",
        "mm_projector.safetensors",
        "config.json",
        "tokenizer.json",
        "model_and_data_args.json",
        "trainer_state.json",
    } <= pushed[0][1]
    metadata, text = read_card(tmp_path)
    assert "lora" in metadata["tags"]
    assert "# tiny" in text
    assert "metamorph generate --model somebody/tiny" in text
