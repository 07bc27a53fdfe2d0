"""Checkpoints of FSDP2 on two processes: what they hold, that training goes on, and who can read them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader
from training_parts import arguments, logged, make_language_model, make_records, make_vision_tower

from metamorph.cli.convert import load_merged
from metamorph.models.connector import find_connector
from metamorph.models.modeling_metamorph import MetaMorphForConditionalGeneration
from metamorph.runs.checkpoint_files import PARTIAL_FOLDER
from metamorph.training.checkpoints.shards import ShardWriter, load_optimizer_of_shards, training_state
from metamorph.training.run import run_training


pytestmark = [pytest.mark.distributed, pytest.mark.slow]
LAUNCH = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
STAGE_2: dict[str, Any] = {"stage": 2, "from_scratch_connector": True, "save_strategy": "steps", "save_steps": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that two processes have left of the runs of `shards_worker.py`."""
    folder = tmp_path_factory.mktemp("shards")
    make_language_model(folder / "llm")
    make_vision_tower(folder / "tower")
    make_records(folder)
    paths = [str(Path(__file__).parent.parent / "parts"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    words = [sys.executable, *LAUNCH, str(Path(__file__).with_name("shards_worker.py")), str(folder), str(folder)]
    killed = subprocess.run([*words, "kill"], env=environment, timeout=240, capture_output=True, text=True)
    assert "(SIGKILL)" in killed.stderr, killed.stderr[-3000:]
    assert [path.name for path in (folder / "killed").glob("checkpoint-*")] == ["checkpoint-2"]
    shards = folder / "killed" / PARTIAL_FOLDER / "checkpoint-4" / "shards"
    assert sorted(path.name for path in shards.iterdir()) == ["__0_0.distcp", "__1_0.distcp"]
    subprocess.run(words, env=environment, timeout=400, check=True)
    return folder


@pytest.fixture(params=[0, 1])
def seen(folder: Path, request: pytest.FixtureRequest) -> dict[str, Any]:
    """What each process has noted."""
    notes: dict[str, Any] = json.loads((folder / f"rank-{request.param}.json").read_text())
    return notes


def test_training_continues_while_a_checkpoint_is_written(seen: dict[str, Any]) -> None:
    assert seen["in_place"] == []  # the worker ends it only after that
    assert len(seen["losses"]) == 6


def test_a_run_killed_while_it_writes_resumes_from_the_checkpoint_before(seen: dict[str, Any]) -> None:
    assert seen["resumed"] == pytest.approx(seen["losses"], abs=1e-6)


def test_a_preempted_run_gathers_nothing_and_resumes(seen: dict[str, Any]) -> None:
    for case in ("stage_1", "stage_2"):
        assert seen[f"{case}-preempted"] == 3
        assert seen[f"{case}-gathered"] == 0
    assert seen["stage_2-continued"] == pytest.approx(seen["losses"], abs=1e-6)


def test_a_failed_write_of_one_process_ends_all(folder: Path, seen: dict[str, Any]) -> None:
    assert "checkpoint-6 cannot be written to --output_dir" in seen["error"]
    assert "No space left on device" in seen["error"]
    assert f"the last good checkpoint is {folder / 'full' / 'checkpoint-4'}" in seen["error"]
    assert not (folder / "full" / PARTIAL_FOLDER).exists()


def test_states_of_the_optimizers_own_type_are_saved_and_loaded(tmp_path: Path, monkeypatch: Any) -> None:
    """PyTorch cannot copy torchao's 8-bit states for a background write."""
    torchao = pytest.importorskip("torchao.optim")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # torchao's step: no C compiler
    torch.manual_seed(0)
    models = [torch.nn.Linear(128, 64) for _ in range(2)]
    optimizers = [torchao.AdamW8bit(model.parameters()) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        model(torch.randn(4, 128)).sum().backward()
        optimizer.step()
    ShardWriter(timedelta(minutes=1)).start(training_state(models[0], optimizers[0]), tmp_path / "shards")
    load_optimizer_of_shards(models[1], optimizers[1], tmp_path)
    saved, loaded = (optimizer.state[model.weight] for model, optimizer in zip(models, optimizers, strict=True))
    assert torch.equal(loaded["exp_avg"].dequantize(), saved["exp_avg"].dequantize())
    assert torch.equal(loaded["exp_avg_sq"].dequantize(), saved["exp_avg_sq"].dequantize())


@pytest.mark.parametrize("case", ["stage_1", "stage_2"])
def test_a_checkpoint_holds_trained_weights_and_their_optimizer_once(folder: Path, case: str) -> None:
    trained = json.loads((folder / "rank-0.json").read_text())[f"{case}-trained"]
    checkpoint = folder / f"preempted-{case}" / "checkpoint-3"
    assert not list(checkpoint.rglob("*.safetensors"))
    stored = FileSystemReader(checkpoint / "shards").read_metadata().state_dict_metadata
    expected = {f"model.{name}" for name in trained}
    expected |= {f"optimizer.state.{name}.{state}" for name in trained for state in ("step", "exp_avg", "exp_avg_sq")}
    assert {name for name in stored if not name.startswith("optimizer.param_groups")} == expected
    size = sum(file.stat().st_size for file in (checkpoint / "shards").glob("*.distcp"))
    headers = 2500 * len(stored)  # PyTorch's, of every tensor
    assert 12 * sum(trained.values()) <= size <= 12 * sum(trained.values()) + headers


def test_one_process_resumes_a_checkpoint_of_two(folder: Path, tmp_path: Path) -> None:
    losses = json.loads((folder / "rank-0.json").read_text())["losses"]
    flags = STAGE_2 | {"max_steps": 6, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    checkpoint = str(folder / "stage_2" / "checkpoint-4")
    result = run_training(*arguments(folder, tmp_path, **flags, resume_from_checkpoint=checkpoint))
    assert logged(result) == pytest.approx(losses, abs=1e-5)
    assert not (tmp_path / "checkpoint-6" / "shards").exists()


def test_a_plain_folder_of_a_checkpoint_is_the_result_of_that_step(folder: Path, tmp_path: Path) -> None:
    checkpoint = str(folder / "stage_2" / "checkpoint-6")
    flags = STAGE_2 | {"max_steps": 6, "per_device_train_batch_size": 2, "resume_from_checkpoint": checkpoint}
    run_training(*arguments(folder, tmp_path, **flags))
    written, expected = (load_file(path / "model.safetensors") for path in (tmp_path, folder / "stage_2"))
    assert set(written) == set(expected)
    assert all(torch.equal(written[name], weight) for name, weight in expected.items())


def test_a_checkpoint_in_shards_is_refused_where_a_plain_folder_is_needed(folder: Path, tmp_path: Path) -> None:
    checkpoint = str(folder / "preempted-stage_1" / "checkpoint-3")
    for use in (find_connector, load_merged, MetaMorphForConditionalGeneration.from_pretrained):
        with pytest.raises(ValueError, match=r"--resume_from_checkpoint .+ --max_steps 3 .+ --output_dir FOLDER"):
            use(checkpoint)
    with pytest.raises(ValueError, match="is a checkpoint of a sharded run"):
        arguments(folder, tmp_path, stage=2, model_name_or_path=checkpoint)
