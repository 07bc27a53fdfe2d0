"""`--sharding fsdp2` through the real trainer. Needs a GPU: on a CPU, Accelerate silently trains with DDP instead."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_parts import make_language_model, make_records, make_vision_tower


pytestmark = pytest.mark.distributed


TESTS = Path(__file__).parent.parent


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_fsdp2_shards_all_but_the_frozen_tower_and_trains_as_ddp(tmp_path: Path) -> None:
    make_language_model(tmp_path / "llm")
    make_vision_tower(tmp_path / "tower")
    make_records(tmp_path)
    processes = str(min(torch.cuda.device_count(), 2))
    subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes),
            *(str(Path(__file__).with_name("fsdp2_gpu_worker.py")), str(tmp_path), str(tmp_path)),
        ],
        check=True,
        timeout=600,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS / "parts"), os.environ.get("PYTHONPATH", "")])},
    )
    ddp, fsdp2, resumed = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("ddp", "fsdp2", "resumed"))
    assert not ddp["model"]
    for seen in (fsdp2, resumed):
        assert seen["model"], "the trainer's model is not an FSDPModule: FSDP2 became something else"
        assert seen["layers"]
        assert seen["sharded"]
        assert seen["float32"]
        assert not seen["tower_sharded"]
        assert seen["tower_dtype"] == "torch.bfloat16"
    assert fsdp2["losses"] == pytest.approx(ddp["losses"], abs=0.05)  # bfloat16
    assert resumed["losses"] == pytest.approx(fsdp2["losses"], abs=0.01)
    full, reference = (load_file(tmp_path / name / "model.safetensors") for name in ("fsdp2", "ddp"))
    assert set(full) == set(reference)
    assert {weight.dtype for weight in full.values()} == {torch.float32}
    for name, weight in reference.items():
        if "vision_tower" in name:
            assert torch.equal(full[name], weight), name
