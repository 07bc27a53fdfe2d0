"""Our model under FSDP2 on two processes: the losses of one, and checkpoints that one can read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from fsdp2_parts import build, train
from safetensors.torch import load_file
from training_parts import arguments, make_language_model, make_records, make_vision_tower


pytestmark = pytest.mark.distributed


TESTS = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    make_language_model(folder / "llm")
    make_vision_tower(folder / "tower")
    make_records(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_two_shards_train_as_one_process_and_reload_on_one(parts: Path, tmp_path: Path, stage: int) -> None:
    paths = [str(TESTS / "parts"), os.environ.get("PYTHONPATH", "")]
    subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *(str(Path(__file__).with_name("fsdp2_worker.py")), str(parts), str(tmp_path), str(stage)),
        ],
        check=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
    )
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert seen["layers"], "decoder layers are not sharded one by one"
    assert seen["sharded"], "some weights are not sharded"
    assert not seen["encoder"], "the frozen tower is sharded"

    model_args, _, _ = arguments(parts, tmp_path, stage=stage, from_scratch_connector=stage == 2)
    model = build(model_args)
    losses = train(model, model_args, parts)
    assert seen["losses"] == pytest.approx([loss.item() for loss in losses], abs=1e-4)

    expected = model.state_dict()
    full = load_file(tmp_path / "full.safetensors")
    assert set(full) == set(expected)
    for name, weight in expected.items():
        assert torch.allclose(full[name], weight, atol=1e-4), name

    # The distributed checkpoint of two processes, read by one.
    fresh = {name: torch.zeros_like(weight) for name, weight in expected.items() if "vision_tower" not in name}
    dcp.load({"model": fresh}, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    for name, weight in fresh.items():
        assert torch.equal(weight, full[name]), name
