"""The visualizer through submit.sh on two nodes, preempted once: it ends with the weights of a run in one piece."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from slurm_parts import needs_slurm, submit
from visualization_parts import RESOLUTION, random_images, write_tiny_diffusion, write_tiny_tower

from metamorph import cli


pytestmark = needs_slurm

FLAGS = ("--resolution", str(RESOLUTION), "--hidden_dim", "16", "--save_step", "1", "--unfreeze_unet", "True")
WEIGHTS = ("projector/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.safetensors")


def test_visualizer_is_preempted_requeued_and_goes_on_at_the_next_image(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for index, image in enumerate(random_images(8, size=(3000, 2400))):  # large: a signal meets a running job
        image.save(tmp_path / "images" / f"{index}.png")
    variables = {
        "DIFFUSION_MODEL": write_tiny_diffusion(tmp_path / "diffusion"),
        "VISION_TOWER": write_tiny_tower(tmp_path / "tower"),
        "IMAGE_FOLDER": tmp_path / "images",
        "OUTPUT_DIR": tmp_path / "two",
        "NUM_TOKENS": 4,
        "BATCH_SIZE": 2,
        "TRAINING_STEPS": 16,
        "MIXED_PRECISION": "no",
    }
    job = submit("visualization/submit.sh", tmp_path, variables, *FLAGS)
    job.wait_for("two steps", (tmp_path / "two" / "checkpoint-2").is_dir)
    job.reach_time_limit()
    job.wait_for_requeue()
    assert (tmp_path / "two" / "preempted.json").is_file()
    assert job.wait_for_end() == "COMPLETED", job.story()
    assert job.field("Restarts") == "1"
    assert not (tmp_path / "two" / "preempted.json").exists()

    plain = ["--pretrained_model_name_or_path", str(variables["DIFFUSION_MODEL"]), "--lr", "1e-4", "--batch_size", "4"]
    for name in ("VISION_TOWER", "IMAGE_FOLDER", "NUM_TOKENS", "TRAINING_STEPS"):
        plain += [f"--{name.lower()}", str(variables[name])]
    assert cli.main(["train-visualizer", *plain, "--output_dir", str(tmp_path / "one"), *FLAGS]) == 0
    for name in WEIGHTS:
        expected, found = load_file(tmp_path / "one" / name), load_file(tmp_path / "two" / name)
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            assert (found[key] - value).abs().max() < 1e-4, key
