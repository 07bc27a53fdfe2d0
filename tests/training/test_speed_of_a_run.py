"""The flags of speed through the real command: the same losses and gradient norms, step by step."""

import json
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from accelerate.utils import DynamoBackend
from training_parts import arguments, make_language_model, make_records, make_vision_tower, training_lines

from metamorph.models import text_head
from metamorph.training.run import run_training


pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    make_language_model(folder / "llm")
    make_vision_tower(folder / "tower")
    make_records(folder)
    return folder


def losses(parts: Path, output_dir: Path, stage: int, **flags: object) -> list[dict[str, float]]:
    """What each step logs about losses and gradients."""
    start = {} if stage == 1 else {"from_scratch_connector": True}
    result = run_training(*arguments(parts, output_dir, stage=stage, max_steps=3, **start, **flags))
    lines = training_lines(result)
    names = ("loss", "text_loss", "visual_loss", "grad_norm")
    return [{name: line[name] for name in names if name in line} for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_all_flags_of_speed_together_change_nothing(stage, parts, tmp_path, monkeypatch):
    flags = {"packing": True, "model_max_length": 64, "per_device_train_batch_size": 1}
    plain = losses(parts, tmp_path / "plain", stage, text_loss="full", **flags)
    monkeypatch.setattr(text_head.TextLossOptions, "chunk_size", lambda self, vocabulary: 3)
    fast = losses(
        parts,
        tmp_path / "fast",
        stage,
        text_loss="chunked",
        recompute="selective",
        torch_compile_backend="aot_eager",
        **flags,
    )
    assert len(plain) == 3
    for ours, theirs in zip(fast, plain, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_a_run_records_that_its_layers_are_compiled(parts, tmp_path):
    run_training(*arguments(parts, tmp_path, stage=1, max_steps=1, torch_compile_backend="eager"))
    recorded = json.loads((tmp_path / "training_args.json").read_text())
    assert (recorded["torch_compile"], recorded["torch_compile_backend"]) == (True, "eager")
    # Accelerate does not compile the entire model around the layers.
    assert AcceleratorState().dynamo_plugin.backend == DynamoBackend.NO
