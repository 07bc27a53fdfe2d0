"""The same seed writes the same files, also on several threads, and PyTorch's settings are restored afterwards."""

import hashlib
import os
from pathlib import Path

import pytest
import torch
from training_parts import arguments, make_language_model, make_records, make_vision_tower
from transformers import TrainerCallback

from metamorph.models.connector import write_connector
from metamorph.training.run import run_training


pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def wide_parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large enough that PyTorch divides its sums among threads."""
    folder = tmp_path_factory.mktemp("wide_parts")
    make_language_model(folder / "llm", hidden_size=128)
    make_vision_tower(folder / "tower")
    make_records(folder, 24)
    return folder


def hashes(folder: Path) -> dict[str, str]:
    files = {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


@pytest.mark.parametrize(
    ("stage", "flags", "files"),
    [
        (1, {}, {"mm_projector.safetensors"}),
        (2, {"from_scratch_connector": True}, {"model.safetensors"}),
        (
            2,
            {"from_scratch_connector": True, "lora_enable": True, "lora_r": 2},
            {"adapter_model.safetensors", "mm_projector.safetensors"},
        ),
    ],
)
def test_two_runs_on_two_threads_write_equal_files(
    stage: int, flags: dict, files: set[str], wide_parts: Path, tmp_path: Path, two_threads: None
) -> None:
    written = []
    for number in range(2):
        folder = tmp_path / str(number)
        sizes = {"per_device_train_batch_size": 24, "max_steps": 3}
        run_training(*arguments(wide_parts, folder, stage=stage, **sizes, **flags))
        written.append(hashes(folder))
    assert written[0].keys() == files
    assert written[0] == written[1]


def test_connector_files_of_the_same_weights_are_equal(tmp_path: Path) -> None:
    """Safetensors puts the entries of the metadata into another order each time."""
    tensors = {"mm_projector.weight": torch.ones(2, 3), "new_rows": torch.zeros(2, 3)}
    config = {"version": "llama3", "num_image_tokens": 4}
    files = [write_connector(tmp_path, tensors, ["<image_start>", "<ü>"], config).read_bytes() for _ in range(16)]
    assert len(set(files)) == 1


class Settings(TrainerCallback):
    """What is set while a run trains."""

    def on_train_begin(self, *args: object, **kwargs: object) -> None:
        self.deterministic = torch.are_deterministic_algorithms_enabled()
        self.is_an_error = not torch.is_deterministic_algorithms_warn_only_enabled()
        self.fills_memory = torch.utils.deterministic.fill_uninitialized_memory
        self.workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")


@pytest.mark.parametrize("full", [False, True])
def test_settings_are_restored(full: bool, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.delenv("CUDA_LAUNCH_BLOCKING", raising=False)
    settings = Settings()
    run_training(*arguments(parts, tmp_path, stage=1, max_steps=1, full_determinism=full), callbacks=[settings])
    assert (settings.deterministic, settings.is_an_error) == (True, full)
    assert settings.fills_memory == full
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert settings.workspace == (":16:8" if full else ":4096:8")
    assert not torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert "CUDA_LAUNCH_BLOCKING" not in os.environ
