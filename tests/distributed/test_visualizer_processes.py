"""Two processes train the visualizer as one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from metamorph.visualization import VisualizerArguments, train_visualizer
from visualization_parts import RESOLUTION, random_images, write_tiny_diffusion, write_tiny_tower


@pytest.mark.slow
def test_r40_two_processes_see_every_sample_once_and_equal_one(tmp_path):
    (tmp_path / "pictures").mkdir()
    for index, picture in enumerate(random_images(7)):
        picture.save(tmp_path / "pictures" / f"{index}.png")
    flags = {
        "output_dir": str(tmp_path / "one"),
        "pretrained_model_name_or_path": str(write_tiny_diffusion(tmp_path / "diffusion")),
        "vision_tower": str(write_tiny_tower(tmp_path / "tower")),
        "image_folder": str(tmp_path / "pictures"),
        "num_tokens": 4,
        "hidden_dim": 16,
        "resolution": RESOLUTION,
        "training_steps": 3,
        "batch_size": 4,
        "lr": 1e-3,
        "unfreeze_unet": True,
        "save_step": 2,
    }
    expected = train_visualizer(VisualizerArguments(**flags)).losses
    (tmp_path / "two").mkdir()
    flags |= {"output_dir": str(tmp_path / "two"), "batch_size": 2}
    (tmp_path / "flags.json").write_text(json.dumps(flags))
    worker = Path(__file__).with_name("visualizer_worker.py")
    subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *(str(worker), str(tmp_path / "flags.json")),
        ],
        check=True,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert json.loads((tmp_path / "two" / "losses.json").read_text()) == pytest.approx(expected, abs=1e-4)
