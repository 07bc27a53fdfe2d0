"""The shipped mini-sd: what its card says, what diffusers loads, and what it draws from attributes."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from metamorph.mini import AssetError, asset_path
from metamorph.miniature.quickstart.conditions import CONDITION_DIM, AttributeEncoder
from metamorph.miniature.world.cells import cells_of
from metamorph.miniature.world.checker import judge
from metamorph.miniature.world.render import render_array
from metamorph.miniature.world.scenes import Scene, SceneObject, sample_scene
from metamorph.visualization.projector import pad_condition
from tools.miniature.build_sd import SdRecipe, build, load_asset
from tools.miniature.cards import verify_folder
from tools.miniature.sd_unet import UnetRecipe, new_noise_scheduler, sample_images
from tools.miniature.sd_vae import VaeRecipe, to_images, to_pixels


@pytest.fixture(scope="module")
def asset():
    return load_asset(asset_path("mini-sd"))


def reserved_scenes(count: int, num_objects: int) -> list[Scene]:
    rng = np.random.default_rng([7, num_objects])
    return [sample_scene(rng, num_objects=num_objects, reserved=True) for _ in range(count)]


def test_parts_are_of_stable_diffusions_kind(asset) -> None:
    vae, unet, _ = asset
    assert unet.config.cross_attention_dim == CONDITION_DIM
    assert unet.config.in_channels == vae.config.latent_channels == 4
    scheduler = DDPMScheduler.from_pretrained(asset_path("mini-sd"), subfolder="scheduler")
    assert scheduler.config.prediction_type == "v_prediction"
    assert scheduler.config.beta_schedule == "scaled_linear"


@torch.no_grad()
def test_vae_rebuilds_unseen_scenes(asset) -> None:
    vae = asset[0]
    rng = np.random.default_rng(8)
    scenes = reserved_scenes(20, 1) + reserved_scenes(20, 2)
    pixels = to_pixels([render_array(scene, rng) for scene in scenes])
    latents = vae.encode(pixels).latent_dist.mode()
    scaled = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    assert abs(scaled.mean().item()) < 0.3
    assert 0.7 < scaled.std().item() < 1.3
    images = to_images(vae.decode(latents).sample)
    assert sum(judge(image, scene).all for image, scene in zip(images, scenes, strict=True)) >= 39


@pytest.mark.slow
@torch.no_grad()
def test_unet_draws_unseen_scenes_from_attributes(asset) -> None:
    vae, unet, encoder = asset
    for num_objects, least in ((1, 11), (2, 9)):
        scenes = reserved_scenes(12, num_objects)
        images = sample_images(unet, vae, new_noise_scheduler(), encoder.encode(scenes), seed=0)
        assert sum(judge(image, scene).all for image, scene in zip(images, scenes, strict=True)) >= least


@torch.no_grad()
def test_condition_tells_what_is_in_each_cell(asset) -> None:
    encoder: AttributeEncoder = asset[2]
    red = Scene((SceneObject("circle", "red", "large", "top left"),))
    blue = Scene((SceneObject("circle", "blue", "large", "top left"),))
    first, second = encoder.encode([red, blue])
    assert first.shape == (16, CONDITION_DIM)
    changed = {cell for cell in range(16) if not torch.equal(first[cell], second[cell])}
    assert changed == set(cells_of("top left")) == {0, 1, 4, 5}
    padded = pad_condition(first[None])
    assert padded.shape == (1, 77, CONDITION_DIM)
    assert not padded[:, 16:].any()


@pytest.mark.slow
def test_build_stops_at_a_gate_and_resumes(tmp_path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    recipe = SdRecipe(
        vae=VaeRecipe(steps=2, batch_size=2),
        unet=UnetRecipe(steps=2, batch_size=2, pair_scenes=2, snapshot_scenes=1),
        evaluation_scenes=2,
    )
    folder = tmp_path / "mini-sd"
    with pytest.raises(AssetError, match=r"below its gates .*vae\.singles"):
        build(folder, recipe=recipe)
    assert not folder.exists()
    figures = build(folder, recipe=recipe, enforce_gates=False)
    assert "resuming" in caplog.text
    card = verify_folder(folder)
    assert card.figures == pytest.approx(figures)
    assert card.recipe["unet.steps"] == 2
    load_asset(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["mini-sd"]
