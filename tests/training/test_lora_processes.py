"""LoRA on two processes, under DDP and ZeRO-3: the losses of one, and one adapter folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_parts import make_language_model, make_records, make_vision_tower

from metamorph.models.modeling_metamorph import MetaMorphForConditionalGeneration


pytest.importorskip("peft", reason="needs the extra lora")
pytestmark = [pytest.mark.distributed, pytest.mark.slow]

TIMEOUT = 300
WORKER = Path(__file__).with_name("command_worker.py")


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pieces")
    make_language_model(folder / "llm")
    make_vision_tower(folder / "tower")
    make_records(folder)
    run = train(folder, folder / "one", 1)
    assert run.returncode == 0, run.stderr[-2000:]
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
    command = [str(WORKER)] if "sharding" in flags else ["-m", "metamorph"]
    return subprocess.run(
        [sys.executable, *launcher, *command, "train", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )


def losses_of(output: Path) -> list[float]:
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [line["loss"] for line in history if "text_loss" in line]


def assert_same_adapter(output: Path, reference: Path) -> None:
    assert losses_of(output) == pytest.approx(losses_of(reference), abs=1e-4)
    models = [MetaMorphForConditionalGeneration.from_pretrained(folder) for folder in (output, reference)]
    ids = torch.arange(24)[None]
    with torch.no_grad():
        ours, theirs = (model(input_ids=ids).logits for model in models)
    assert (ours - theirs).abs().max() <= 1e-3  # after AdamW, which amplifies rounding


def test_two_processes_train_the_adapter_of_one(pieces: Path, tmp_path: Path) -> None:
    """With batches of one sample, of which some have no image or no answer image on one of the two."""
    run = train(pieces, tmp_path, 2)
    assert run.returncode == 0, run.stderr[-2000:]
    assert len(losses_of(tmp_path)) == 4
    assert_same_adapter(tmp_path, pieces / "one")


@pytest.mark.parametrize(("bits", "status"), [(16, 0), (4, 1)], ids=["lora", "qlora"])
def test_zero_3(bits: int, status: int, pieces: Path, tmp_path: Path) -> None:
    """The same losses, and a complete adapter folder; weights in 4 bits are refused."""
    pytest.importorskip("deepspeed", reason="needs the extra deepspeed")
    run = train(pieces, tmp_path / "zero3", 1 if status else 2, sharding="zero3", bits=bits)
    assert bool(run.returncode) == bool(status), run.stderr[-2000:]
    if status:
        assert "--bits 4 does not work with sharded weights" in run.stderr
        return
    assert_same_adapter(tmp_path / "zero3", pieces / "one")
