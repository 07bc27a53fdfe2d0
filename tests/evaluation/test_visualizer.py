"""A visualizer alone: images reconstructed and compared, in the library and in commands."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from perceptual_parts import save_networks
from PIL import Image
from visualization_parts import random_images, tiny_flags

from metamorph.cli import main
from metamorph.evaluation.visualizer import ScaleScores, evaluate_visualizer
from metamorph.inference.draw import SamplerSettings
from metamorph.mini import shipped_folder
from metamorph.miniature.world.render import render
from metamorph.miniature.world.scenes import single_scenes
from metamorph.visualization import VisualizationPipeline, VisualizerArguments, load_visualizer, train_visualizer
from metamorph.visualization.pixels import crop_square
from metamorph.visualization.token_options import load_encoder


pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Holds `tower`, and the visualizers `with_tower` and `plain`, after a step of training each."""
    root = tmp_path_factory.mktemp("visualizer")
    for name in ("with_tower", "plain"):
        train_visualizer(arguments(root, name, save_vision_tower=name == "with_tower"), random_images(4))
    return root


@pytest.fixture(scope="module")
def mini() -> VisualizationPipeline:
    pipeline = load_visualizer(shipped_folder("mini", "visualizer"), shipped_folder("mini", "model"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def arguments(root: Path, name: str, **options) -> VisualizerArguments:
    defaults = tiny_flags(root) | {"output_dir": str(root / name), "training_steps": 1}
    return VisualizerArguments(**(defaults | options))


def world_images(count: int) -> list[Image.Image]:
    scenes = list(single_scenes())
    return [render(scenes[index * len(scenes) // count]) for index in range(count)]


def write_images(folder: Path, images: list[Image.Image]) -> Path:
    folder.mkdir()
    for index, image in enumerate(images):
        image.save(folder / f"{index}.png")
    return folder


def test_vision_tower_is_saved_with_the_pipeline_and_encodes_as_in_training(folder, tmp_path):
    images = random_images(3, size=(50, 32))
    encoder = load_encoder(arguments(folder, "with_tower"))
    with torch.no_grad():
        expected = encoder(torch.stack([encoder.pixel_format.pixels(crop_square(image)) for image in images]))
    pipeline = VisualizationPipeline.from_pretrained(folder / "with_tower")
    assert torch.equal(pipeline.vision_tower.encode_images(images, batch_size=2), expected)
    pipeline.save_pretrained(tmp_path)
    again = VisualizationPipeline.from_pretrained(tmp_path)
    assert torch.equal(again.vision_tower.encode_images(images), expected)
    assert str(folder) not in (folder / "with_tower" / "vision_tower" / "config.json").read_text()


def test_images_can_be_given_instead_of_tokens(folder):
    pipeline = load_visualizer(folder / "plain")
    assert pipeline.vision_tower is not None  # found through visualizer_arguments.json
    pipeline.set_progress_bar_config(disable=True)
    images = random_images(2)
    tokens = load_encoder(arguments(folder, "plain")).encode_images(images)
    options = {"num_inference_steps": 2, "output_type": "pt"}
    drawn = pipeline(images=images, generator=[torch.Generator().manual_seed(i) for i in (1, 2)], **options).images
    expected = pipeline(tokens, generator=[torch.Generator().manual_seed(i) for i in (1, 2)], **options).images
    assert torch.equal(drawn, expected)
    one = pipeline(images=images[0], generator=torch.Generator().manual_seed(1), **options).images
    torch.testing.assert_close(one[0], expected[0], rtol=0, atol=1e-4)


def test_tower_that_does_not_fit_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"128 features, but --visualizer .* was trained on 24"):
        load_visualizer(folder / "plain", shipped_folder("mini", "model"))
    VisualizationPipeline.from_pretrained(folder / "plain").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"neither a vision tower nor visualizer_arguments\.json"):
        load_visualizer(tmp_path)
    with pytest.raises(FileNotFoundError, match="--visualizer"):
        load_visualizer(tmp_path / "none")


def test_mini_draws_what_it_saw_and_finds_it_again(mini):
    """The shipped visualizer: its drawings are nearest to their own originals, and close to them."""
    images = world_images(10)
    settings = SamplerSettings((1.0, 3.0), num_inference_steps=10, batch_size=4)
    found = evaluate_visualizer(mini, images, settings, keep=3)
    for score in found.scales:
        assert all(score.is_nearest)
        assert min(score.cosine) > 0.95
        assert max(score.cosine_to_others) < 0.9
    assert (len(found.originals), len(found.drawn)) == (3, 6)
    error = np.abs(np.asarray(found.drawn[0], dtype=float) - np.asarray(found.originals[0], dtype=float)).mean()
    assert error < 12  # of 255


def test_scores_do_not_depend_on_batches(mini):
    images = world_images(5)
    runs = [
        evaluate_visualizer(mini, images, SamplerSettings(2.0, num_inference_steps=3, batch_size=size))
        for size in (2, 5)
    ]
    first, second = (run.scales[0] for run in runs)
    assert first.cosine == pytest.approx(second.cosine, abs=1e-3)
    assert first.cosine_to_others == pytest.approx(second.cosine_to_others, abs=1e-3)


def test_swapped_drawings_are_not_found(mini):
    """A visualizer whose projector ignores the tokens draws the same image for all: at most one is found."""
    images = world_images(6)
    blind = VisualizationPipeline.from_pretrained(shipped_folder("mini", "visualizer"))
    blind.register_modules(vision_tower=mini.vision_tower)
    blind.set_progress_bar_config(disable=True)
    for parameter in blind.projector.parameters():
        torch.nn.init.zeros_(parameter)
    scores = evaluate_visualizer(blind, images, SamplerSettings(1.0, 3)).scales[0].to_dict()
    assert scores["retrieval_at_1"] <= 0.5
    assert scores["cosine"]["mean"] < 0.9


def test_one_image_has_no_others():
    score = ScaleScores(1.0, cosine=[0.5], is_nearest=[True])
    assert score.to_dict() == {
        "guidance_scale": 1.0,
        "n": 1,
        "cosine": {"mean": 0.5, "std": 0.0},
        "retrieval_at_1": 1.0,
    }


def test_evaluate_visualizer_command(folder, tmp_path, capsys):
    images = write_images(tmp_path / "images", random_images(5))
    words = ["evaluate", "visualizer", "--visualizer", str(folder / "with_tower"), "--images", str(images)]
    words += ["--guidance_scale", "1", "2.5", "--steps", "2", "--output_dir", str(tmp_path / "out")]
    assert main([*words, "--max_images", "4", "--batch_size", "3", "--grid_rows", "2"]) == 0
    text = capsys.readouterr().out
    assert "cosine to others" in text
    assert "lpips: not measured: needs --lpips_weights" in text
    assert "fid: not measured: needs --inception_weights" in text
    report = json.loads((tmp_path / "out" / "visualizer.json").read_text())
    assert [scale["guidance_scale"] for scale in report["scales"]] == [1.0, 2.5]
    assert [item["file"] for item in report["per_image"]] == ["0.png", "1.png", "2.png", "3.png"]
    mean = sum(item["cosine"]["2.5"] for item in report["per_image"]) / 4
    assert report["scales"][1]["cosine"]["mean"] == pytest.approx(mean, abs=1e-4)
    grid = Image.open(tmp_path / "out" / "visualizer.png")
    assert grid.width == 3 * 130 - 2


def test_evaluate_visualizer_with_networks_of_lpips_and_fid(folder, tmp_path, capsys):
    images = write_images(tmp_path / "images", random_images(3))
    lpips, inception = save_networks(tmp_path)
    words = ["evaluate", "visualizer", "--visualizer", str(folder / "plain"), "--images", str(images)]
    words += ["--guidance-scale", "1", "--steps", "1", "--output-dir", str(tmp_path / "out")]
    assert main([*words, "--lpips_weights", str(lpips), "--inception_weights", str(inception)]) == 0
    report = json.loads((tmp_path / "out" / "visualizer.json").read_text())
    assert report["scales"][0]["lpips"]["mean"] > 0
    assert report["scales"][0]["fid"] > 0
    assert report["notes"] == {"fid": "of 3 images: FID of fewer than 2048 is much too large"}
    assert "lpips" in capsys.readouterr().out


def test_visualize_command_writes_originals_and_drawings(tmp_path, capsys):
    for index, image in enumerate(world_images(2)):
        image.save(tmp_path / f"{index}.png")
    words = ["visualize", "--visualizer", "mini", "--image", str(tmp_path / "0.png"), str(tmp_path / "1.png")]
    words += ["--guidance_scale", "2", "--steps", "8", "--output", str(tmp_path / "out" / "grid.png")]
    assert main(words) == 0
    assert "cosine of drawing and original 0.9" in capsys.readouterr().out
    grid = np.asarray(Image.open(tmp_path / "out" / "grid.png").convert("RGB"), dtype=float)
    original, drawing = grid[-128:, :128], grid[-128:, -128:]
    assert np.abs(original - drawing).mean() < 12
    assert main([*words[:4], str(tmp_path / "0.png"), *words[6:], "--drawings_only", "--overwrite"]) == 0
    assert Image.open(tmp_path / "out" / "grid.png").size == (64, 64)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--image", "none.png"], "--image none.png does not exist"),
        (["--steps", "0"], "--steps 0 must be at least 1"),
        (["--guidance_scale", "1", "nan"], "--guidance-scale nan must be a finite number"),
        (["--device", "none"], "--device none cannot be used here"),
        (["--output", "out/grid"], "--output out/grid is not the name of an image: end it in .png"),
        (["--visualizer", "none/none"], "--visualizer none/none"),
        (["--vision_tower", "/none"], "--vision-tower /none"),
    ],
)
def test_bad_input_is_one_line(words, message, tmp_path, capsys):
    random_images(1)[0].save(tmp_path / "0.png")
    assert main(["visualize", "--visualizer", "mini", "--image", str(tmp_path / "0.png"), *words]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error
    assert error.startswith("metamorph visualize: error:")


def test_folder_without_images_is_refused(tmp_path, capsys):
    words = ["evaluate", "visualizer", "--visualizer", "mini", "--images", str(tmp_path)]
    assert main(words) == 2
    assert "holds no image ending in" in capsys.readouterr().err
    (tmp_path / "bad.png").write_text("no image")
    assert main([*words, "--output_dir", str(tmp_path / "out")]) == 2
    assert "bad.png" in capsys.readouterr().err
