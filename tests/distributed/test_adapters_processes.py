"""LoRA on two processes: the losses of one, one adapter folder, and a clear error for the engine that cannot."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_parts import make_language_model, make_records, make_vision_tower

from metamorph.models.modeling_metamorph import MetaMorphForConditionalGeneration


pytest.importorskip("peft", reason="needs metamorph[lora]")
pytestmark = pytest.mark.slow

TIMEOUT = 300


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pieces")
    make_language_model(folder / "llm")
    make_vision_tower(folder / "tower")
    make_records(folder)
    return folder


def train(pieces: Path, output: Path, processes: int, **flags: object) -> subprocess.CompletedProcess[str]:
    """Two samples a step, without dropout, by as many processes."""
    values = {
        "model_name_or_path": pieces / "llm",
        "vision_tower": pieces / "tower",
        "num_image_tokens": 4,
        "data_path": pieces / "data.jsonl",
        "image_folder": pieces / "images",
        "output_dir": output,
        "from_scratch_connector": True,
        "lora_enable": True,
        "lora_r": 4,
        "lora_dropout": 0.0,
        "learning_rate": 1e-2,
        "max_steps": 4,
        "packing": False,
        "per_device_train_batch_size": 2 // processes,
        "logging_steps": 1,
        "save_strategy": "no",
        "bf16": False,
        "use_cpu": True,
        **flags,
    }
    words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return subprocess.run(
        [sys.executable, *launcher, "-m", "metamorph", "train", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )


def losses_of(output: Path) -> list[float]:
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [line["loss"] for line in history if "text_loss" in line]


def test_two_processes_train_the_adapter_of_one(pieces: Path, tmp_path: Path) -> None:
    """With batches of one sample, of which some have no image or no answer image on one of the two."""
    models = []
    for processes in (1, 2):
        run = train(pieces, tmp_path / str(processes), processes)
        assert run.returncode == 0, run.stderr[-2000:]
        models.append(MetaMorphForConditionalGeneration.from_pretrained(tmp_path / str(processes)))
    assert losses_of(tmp_path / "2") == pytest.approx(losses_of(tmp_path / "1"), abs=1e-4)
    assert len(losses_of(tmp_path / "2")) == 4
    ids = torch.arange(24)[None]
    with torch.no_grad():
        one, two = (model(input_ids=ids).logits for model in models)
    assert (one - two).abs().max() <= 1e-3  # after AdamW, which amplifies rounding


def test_zero_3_is_refused_before_it_hangs(pieces: Path, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="needs metamorph[deepspeed]")
    run = train(pieces, tmp_path / "zero3", 1, sharding="zero3")
    assert run.returncode != 0
    assert "--lora_enable True does not work with ZeRO-3: use --sharding zero2" in run.stderr
