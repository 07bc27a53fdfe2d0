"""Two processes log what one logs: counts, gradient norms, validation losses; one of them writes the samples."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from training_parts import arguments, make_language_model, make_records, make_vision_tower

from metamorph.training.run import run_training


pytestmark = pytest.mark.distributed


FLAGS = {
    "from_scratch_connector": True,
    "warmup_ratio": 0,
    "learning_rate": 1e-3,
    "train_sampling_strategy": "sequential",
    "max_steps": -1,
    "num_train_epochs": 1,
    "max_grad_norm": 0.5,
    "eval_strategy": "epoch",
    "eval_on_start": True,
    "sample_steps": 2,
    "save_strategy": "epoch",
    "load_best_model_at_end": True,
}


@pytest.mark.slow
def test_two_processes_log_what_one_does(tmp_path: Path) -> None:
    """Thirteen samples: in the last step the second process has none. So have both in parts of the validation."""
    tests = Path(__file__).parent.parent
    make_language_model(tmp_path / "llm")
    make_vision_tower(tmp_path / "tower")
    make_records(tmp_path, 13)
    make_records(tmp_path / "other", 3)
    (tmp_path / "mixture.yaml").write_text(
        "- {path: data.jsonl, image_folder: images}\n"
        "- {path: other/data.jsonl, image_folder: other/images, name: few}\n"
    )
    (tmp_path / "prompts.txt").write_text("What colour is the sky?\n")
    files: dict[str, Any] = {
        "eval_data_path": str(tmp_path / "mixture.yaml"),
        "eval_specs": [f"answers={tmp_path / 'mixture.yaml'}:7"],
        "sample_prompts": str(tmp_path / "prompts.txt"),
    }
    subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *(str(Path(__file__).with_name("observability_worker.py")), str(tmp_path), str(tmp_path / "two")),
            json.dumps({**FLAGS, **files, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2}),
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
    two = json.loads((tmp_path / "two" / "log.json").read_text())
    flags = {**FLAGS, **files, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 8}
    one = run_training(*arguments(tmp_path, tmp_path / "one", stage=2, **flags)).log_history
    assert [line["step"] for line in two] == [line["step"] for line in one] == [0, 1, 2, 3, 4, 4, 4]
    counts = ("tokens_seen", "total_flos", "num_text_tokens", "num_visual_tokens")
    for ours, theirs in zip(two, one, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            if name.endswith(counts):
                assert ours[name] == value, name
            elif name.startswith(("eval_", "grad_norm", "visual_cosine")) and not name.endswith("_runtime"):
                assert ours[name] == pytest.approx(value, rel=1e-4), name
    end = two[-1]
    assert end["train_samples_per_second"] * end["train_runtime"] == pytest.approx(13, rel=1e-2)
    for folder in ("two", "one"):
        steps = sorted((tmp_path / folder / "samples").iterdir())
        assert [step.name for step in steps] == ["step-2", "step-4"]
    answers = [(tmp_path / folder / "samples" / "step-4" / "samples.jsonl").read_text() for folder in ("two", "one")]
    assert answers[0] == answers[1]
