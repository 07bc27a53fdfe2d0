"""The commands as a user types them: train both stages, then generate; and training on two processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from training_parts import arguments

from metamorph import cli
from metamorph.training.run import run_training


pytestmark = pytest.mark.integration


def words(**flags: object) -> list[str]:
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def common(parts: Path) -> dict[str, object]:
    return {
        "model_name_or_path": parts / "llm",
        "vision_tower": parts / "tower",
        "data_path": parts / "data.jsonl",
        "image_folder": parts / "images",
        "num_image_tokens": 4,
        "max_steps": 2,
        "packing": False,
        "per_device_train_batch_size": 2,
        "save_strategy": "no",
        "bf16": False,
        "use_cpu": True,
    }


def test_train_both_stages_and_generate(parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("learning_rate: 1e-3\nlogging_steps: 1\ndisable_tqdm: true\n")
    start = ["train", "--config", str(recipe), *words(**common(parts))]
    assert cli.main([*start, *words(tune_mm_mlp_adapter=True, output_dir=tmp_path / "1")]) == 0
    assert f"stage 1 finished after 2 steps: {tmp_path / '1'}" in capsys.readouterr().out
    assert cli.main([*start, *words(pretrain_mm_mlp_adapter=tmp_path / "1", output_dir=tmp_path / "2")]) == 0
    assert f"stage 2 finished after 2 steps: {tmp_path / '2'}" in capsys.readouterr().out
    assert json.loads((tmp_path / "2" / "training_args.json").read_text())["learning_rate"] == 1e-3

    Image.new("RGB", (50, 40), "blue").save(tmp_path / "in.png")
    ask = ["generate", "--model", str(tmp_path / "2"), "--prompt", "What is this?", "--image", str(tmp_path / "in.png")]
    assert cli.main([*ask, "--max-new-tokens", "6", "--temperature", "1", "--seed", "3"]) == 0
    first = capsys.readouterr().out
    assert cli.main([*ask, "--max-new-tokens", "6", "--temperature", "1", "--seed", "3"]) == 0
    assert capsys.readouterr().out == first
    assert cli.main([*ask, "--image", str(tmp_path / "none.png")]) == 2
    assert "none.png does not exist" in capsys.readouterr().err


@pytest.mark.slow
def test_r08_r26_two_processes_equal_one_and_one_of_them_writes(parts: Path, tmp_path: Path) -> None:
    """Two ranks with one sample each, of which some have no image and some no answer image, against one with two."""
    flags = {"from_scratch_connector": True, "warmup_ratio": 0, "max_steps": 4, "learning_rate": 1e-3}
    command = {**common(parts), **flags, "output_dir": tmp_path / "two", "per_device_train_batch_size": 1}
    logging = {"logging_steps": 1, "disable_tqdm": True, "save_strategy": "steps", "save_steps": 2}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [*launch, "-m", "metamorph", "train", *words(**{**command, **logging})],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    one = run_training(*arguments(parts, tmp_path / "one", stage=2, **flags))

    history = json.loads((tmp_path / "two" / "trainer_state.json").read_text())["log_history"]
    ours = [line for line in history if "text_loss" in line]
    theirs = [line for line in one.log_history if "text_loss" in line]
    assert len(ours) == len(theirs) == 4
    for mine, other in zip(ours, theirs, strict=True):
        for name in ("loss", "text_loss", "visual_loss", "visual_cosine", "num_text_tokens", "num_visual_tokens"):
            assert mine.get(name) == pytest.approx(other.get(name), abs=2e-5), name
    weights = load_file(tmp_path / "two" / "model.safetensors")
    for name, weight in one.model.state_dict().items():
        if name in weights:
            torch.testing.assert_close(weights[name], weight, atol=2e-4, rtol=0)
    # Each rank writes its own random state; everything else is written once, by the main process.
    assert sorted(file.name for file in (tmp_path / "two" / "checkpoint-2").glob("rng_state*")) == [
        "rng_state_0.pth",
        "rng_state_1.pth",
    ]
    assert run.stdout.count("stage 2 finished") == 1
