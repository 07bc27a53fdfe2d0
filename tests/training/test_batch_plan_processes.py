"""Two processes share an epoch: each sample once, as many steps on both, also after a crash."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from packing_parts import TWO_EPOCHS
from training_parts import arguments, logged, make_language_model, make_records, make_vision_tower

from metamorph.training.run import run_training


pytestmark = pytest.mark.distributed


NUM_SAMPLES = 13


@pytest.mark.slow
def test_two_processes_see_each_sample_once_and_resume_at_the_next(tmp_path: Path) -> None:
    tests = Path(__file__).parent.parent
    make_language_model(tmp_path / "llm")
    make_vision_tower(tmp_path / "tower")
    make_records(tmp_path, NUM_SAMPLES)
    subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *(str(Path(__file__).with_name("batch_plan_worker.py")), str(tmp_path), str(tmp_path)),
        ],
        check=True,
        timeout=600,
        env=os.environ
        | {
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join([str(tests / "parts"), os.environ.get("PYTHONPATH", "")]),
        },
    )
    ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    steps = len(ranks[0]["uninterrupted"]) // 2
    for epoch in (slice(0, steps), slice(steps, None)):
        seen = [number for rank in ranks for step in rank["uninterrupted"][epoch] for number in step]
        assert sorted(seen) == list(range(NUM_SAMPLES))
    for rank in ranks:
        assert len(rank["uninterrupted"]) == 2 * steps > 4
        assert rank["first"] == rank["uninterrupted"][:2]
        assert rank["rest"] == rank["uninterrupted"][1:]  # killed at the end of step 2, before it was saved

    # One process with twice the rows takes the same steps.
    flags = {**TWO_EPOCHS, "per_device_train_batch_size": 2}
    one = run_training(*arguments(tmp_path, tmp_path / "one", stage=2, **flags))
    losses = logged(one)
    assert losses == pytest.approx(ranks[0]["losses"], abs=2e-5)
