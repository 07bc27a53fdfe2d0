"""`metamorph train-visualizer` from a YAML recipe and flags."""

from __future__ import annotations

from pathlib import Path

import pytest
from visualization_parts import RESOLUTION, random_images, write_tiny_diffusion, write_tiny_tower

from metamorph.cli import main
from metamorph.flags.recipes import parse_arguments
from metamorph.visualization import VisualizationPipeline, VisualizerArguments
from metamorph.visualization.token_options import TokenOptions


pytestmark = pytest.mark.integration


def test_recipe_and_flags_train_a_visualizer(tmp_path, capsys):
    (tmp_path / "pictures").mkdir()
    for index, image in enumerate(random_images(3)):
        image.save(tmp_path / "pictures" / f"{index}.webp")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"vision_tower: {write_tiny_tower(tmp_path / 'tower')}\n"
        f"pretrained_model_name_or_path: {write_tiny_diffusion(tmp_path / 'diffusion')}\n"
        f"image_folder: {tmp_path / 'pictures'}\n"
        f"resolution: {RESOLUTION}\n"
        "num_tokens: 4\nhidden_dim: 16\ntraining_steps: 9\nbatch_size: 2\nlr: 1e-4\nunfreeze_unet: true\n"
        "validation_guidance_scales: [1, 2.5]\n"
    )
    out = tmp_path / "out"
    assert main(["train-visualizer", "--config", str(recipe), "--training_steps", "2", "--output_dir", str(out)]) == 0
    assert "visualizer finished after" in capsys.readouterr().out
    assert VisualizationPipeline.from_pretrained(out).projector.config.input_dim == 24


def test_shipped_recipe_is_valid():
    (args,) = parse_arguments((VisualizerArguments,), ["--config", "visualizer-sd1.5", "--output_dir", "out"])
    assert (args.lr, args.unfreeze_unet, args.warmup_steps) == (1.1e-5, True, 4000)


def test_guide_names_every_flag():
    guide = (Path(__file__).parents[2] / "visualization" / "Train_Visualization.md").read_text(encoding="utf-8")
    ours = VisualizerArguments.__annotations__.keys() | TokenOptions.__annotations__.keys()
    missing = [name for name in ours if f"`--{name}`" not in guide]
    assert not missing
