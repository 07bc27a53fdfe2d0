"""The estimate of a run's memory against what a process really takes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from training_parts import make_language_model, make_vision_tower


pytestmark = pytest.mark.integration
SIZES = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 16384,
}
"""29 million parameters: large compared to what Python and the libraries allocate."""


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize(("processes", "accumulation"), [(1, 1), (2, 1), (2, 2)])
def test_estimate_is_near_what_a_run_takes(tmp_path: Path, processes: int, accumulation: int) -> None:
    """With FSDP2, accumulation must not add the gradients of all weights on each process, but of its shard: +18 %."""
    make_language_model(tmp_path / "llm", **SIZES)
    make_vision_tower(tmp_path / "tower")
    (tmp_path / "images").mkdir()
    (tmp_path / "data.jsonl").write_text("")
    here = Path(__file__).parent
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    run = subprocess.run(
        [
            *(sys.executable, *(launcher if processes > 1 else [])),
            *(str(here / "memory_worker.py"), str(tmp_path), str(accumulation)),
        ],
        env=os.environ
        | {
            "OMP_NUM_THREADS": "1",
            "MALLOC_MMAP_THRESHOLD_": "262144",  # else glibc keeps much of what PyTorch has freed
            "PYTHONPATH": os.pathsep.join([str(here), str(here.parent / "parts"), os.environ.get("PYTHONPATH", "")]),
        },
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert numbers["estimated"] == pytest.approx(numbers["measured"], rel=0.1), numbers
