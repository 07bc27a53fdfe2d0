"""Two processes count bad records together, and stop together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


pytestmark = pytest.mark.distributed


@pytest.mark.slow
def test_r11_bad_records_of_all_ranks_count_together_and_stop_all(tmp_path):
    worker = Path(__file__).with_name("bad_records_worker.py")
    subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *(str(worker), str(tmp_path)),
        ],
        check=True,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0] == ranks[1]
    assert ranks[0]["counts"] == [3, 3]
    assert "5 of 20 records are bad, more than --max_bad_fraction 0.2 allows" in ranks[0]["error"]
    assert ranks[0]["bad"] == {"image_count": 2, "missing_image": 1, "unsupervised": 2}
