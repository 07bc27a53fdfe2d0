"""Several processes train the visualizer as one does, and a killed run resumes as if uninterrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from visualization_parts import random_images, tiny_flags, write_archive

from metamorph.runs.checkpoint_files import checkpoints
from metamorph.visualization import VisualizerArguments, train_visualizer
from metamorph.visualizer_training.dataset import LATENTS_FOLDER


pytestmark = [pytest.mark.distributed, pytest.mark.slow]
WORKER = str(Path(__file__).with_name("visualizer_worker.py"))


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> dict:
    """Six images in three archives; six steps of two images are two epochs."""
    folder = tmp_path_factory.mktemp("visualizer")
    images = random_images(6)
    for name, first, last in (("a", 0, 3), ("b", 3, 4), ("c", 4, 6)):
        write_archive(folder / f"{name}.tar", {f"{index}.png": images[index] for index in range(first, last)})
    (folder / "archives.json").write_text('["a.tar", "b.tar", "c.tar"]')
    options = {"training_steps": 6, "lr": 1e-3, "unfreeze_unet": True, "save_step": 2}
    return tiny_flags(folder) | options | {"image_jsons": [str(folder / "archives.json")]}


@pytest.fixture(scope="module")
def one(flags, tmp_path_factory) -> tuple[Path, list[float]]:
    """Folder and losses of an uninterrupted process."""
    folder = tmp_path_factory.mktemp("one")
    return folder, train_visualizer(VisualizerArguments(output_dir=str(folder), **flags)).losses


def start(folder: Path, flags: dict, *words: str, processes: int = 1) -> subprocess.CompletedProcess:
    """Train in other processes; the result is in `folder`."""
    folder.mkdir(exist_ok=True)
    (folder / "flags.json").write_text(json.dumps(flags | {"output_dir": str(folder)}))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), WORKER, str(folder / "flags.json"), *words]
    paths = [str(Path(__file__).parent.parent / "parts"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run(command, timeout=600, env=environment, check=False)


def seen(folder: Path) -> list[str]:
    """Numbers of the images that processes have read."""
    return [line for file in folder.glob("images-*.txt") for line in file.read_text().splitlines()]


def test_two_processes_encode_each_image_once_between_them(flags, one, tmp_path):
    options = {"batch_size": 1, "cache_latents": True, "save_step": 0}
    assert start(tmp_path, flags | options, processes=2).returncode == 0
    assert json.loads((tmp_path / "losses.json").read_text()) == pytest.approx(one[1], abs=1e-4)
    assert [sorted(file.read_text().split()) for file in sorted(tmp_path.glob("images-*.txt"))] == [[*"012"], [*"345"]]
    assert not (tmp_path / LATENTS_FOLDER).exists()


def test_r40_two_processes_see_three_archives_once_and_one_process_resumes(flags, one, tmp_path):
    expected = one[1]
    two = tmp_path / "two"
    assert start(two, flags | {"batch_size": 1, "save_total_limit": None}, processes=2).returncode == 0
    assert json.loads((two / "losses.json").read_text()) == pytest.approx(expected, abs=1e-4)
    assert len(list(two.glob("images-*.txt"))) == 2
    assert sorted(seen(two)) == sorted([*"012345"] * 2)  # all six, once in each of two epochs
    rest = tmp_path / "rest"
    assert start(rest, flags | {"resume_from_checkpoint": str(two / "checkpoint-4")}).returncode == 0
    assert json.loads((rest / "losses.json").read_text()) == pytest.approx(expected[4:], abs=1e-4)
    ranks = [file.read_text().splitlines()[4:] for file in two.glob("images-*.txt")]
    assert sorted(seen(rest)) == sorted(number for rank in ranks for number in rank)


def test_r42_killed_while_saving_it_resumes_from_the_checkpoint_before(flags, one, tmp_path):
    folder, expected = one
    assert start(tmp_path, flags, "2").returncode == -signal.SIGKILL
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2"]
    assert (tmp_path / "_partial" / "checkpoint-4" / "optimizer.pt").is_file()
    result = train_visualizer(VisualizerArguments(output_dir=str(tmp_path), **flags))
    assert (result.first_step, result.losses) == (2, expected[2:])
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-6"]
    assert not (tmp_path / "_partial").exists()
    for part in ("projector", "unet"):
        weights = [load_file(place / part / "diffusion_pytorch_model.safetensors") for place in (folder, tmp_path)]
        assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])


def test_fsdp2_trains_as_one_process_does_and_exchanges_checkpoints_with_it(flags, one, tmp_path):
    folder, expected = one
    options = {"sharding": "fsdp2", "batch_size": 1, "validation_images": [str(tmp_path / "image.png")]}
    random_images(1)[0].save(tmp_path / "image.png")
    two = tmp_path / "two"
    resume = {"resume_from_checkpoint": str(folder / "checkpoint-4"), "save_step": 1}
    assert start(two, flags | options | resume, processes=2).returncode == 0
    assert json.loads((two / "losses.json").read_text()) == pytest.approx(expected[4:], abs=1e-4)
    assert (two / "is_sharded.json").read_text() == "true"
    assert len(list((two / "validation").iterdir())) == 2
    rest = VisualizerArguments(
        output_dir=str(tmp_path / "rest"), resume_from_checkpoint=str(two / "checkpoint-5"), **flags
    )
    assert train_visualizer(rest).losses == pytest.approx(expected[5:], abs=1e-4)
    for part in ("projector", "unet"):
        file = Path(part) / "diffusion_pytorch_model.safetensors"
        weights, sharded, continued = (load_file(place / file) for place in (folder, two, tmp_path / "rest"))
        assert weights.keys() == sharded.keys()
        for name, value in weights.items():
            assert (sharded[name] - value).abs().max() < 1e-4, name
            assert (continued[name] - value).abs().max() < 1e-4, name
