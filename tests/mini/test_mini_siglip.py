"""The shipped mini-siglip: what its card says, what Transformers loads, and what its tokens tell."""

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, SiglipModel

from metamorph.mini import asset_path
from metamorph.miniature.world.cells import cells_of
from metamorph.miniature.world.render import coverage, render
from metamorph.miniature.world.scenes import POSITIONS, SHAPES, SIZES, Scene, SceneObject, is_reserved, sample_scene
from metamorph.models.configuration_metamorph import MetaMorphConfig
from metamorph.models.vision_tower import VisionTower, load_vision_encoder
from tools.miniature.build_siglip import encode_scenes, reduced_tokens
from tools.miniature.probes import PROBE_NAMES, LinearProbes, probe_scenes, scene_pixels
from tools.miniature.siglip_data import (
    IGNORED,
    SiglipRecipe,
    caption_ids,
    caption_tokenizer,
    cell_classes,
    changed_in_one_attribute,
    scene_key,
    training_scenes,
)


@pytest.fixture(scope="module")
def tower():
    model, report = SiglipModel.from_pretrained(
        asset_path("mini-siglip"), dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model.eval()


def test_probes_read_every_attribute(tower):
    rng = np.random.default_rng(2024)
    scenes = {
        (objects, reserved): probe_scenes(rng, 120 if reserved else 250, num_objects=objects, reserved=reserved)
        for objects in (1, 2)
        for reserved in (False, True)
    }
    fitted_on = scenes[1, False] + scenes[2, False]
    probes = LinearProbes.fit(encode_scenes(tower, fitted_on, rng), fitted_on)
    for objects in (1, 2):
        accuracy = probes.accuracy(encode_scenes(tower, scenes[objects, True], rng), scenes[objects, True])
        assert all(accuracy[name] >= 0.97 for name in PROBE_NAMES), accuracy


def test_probes_cannot_read_an_untrained_tower(tower):
    torch.manual_seed(0)
    untrained = SiglipModel(tower.config).eval()
    rng = np.random.default_rng(5)
    fitted_on = probe_scenes(rng, 250, num_objects=1, reserved=False)
    judged_on = probe_scenes(rng, 100, num_objects=1, reserved=True)
    probes = LinearProbes.fit(encode_scenes(untrained, fitted_on, rng), fitted_on)
    assert probes.accuracy(encode_scenes(untrained, judged_on, rng), judged_on)["shape"] < 0.8


def test_image_processor_makes_what_the_tower_was_trained_on():
    scene = sample_scene(np.random.default_rng(1))
    processor = AutoImageProcessor.from_pretrained(asset_path("mini-siglip"))
    pixels = processor(images=render(scene), return_tensors="pt").pixel_values
    torch.testing.assert_close(pixels, scene_pixels([scene]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("size", SIZES)
def test_objects_cover_exactly_their_cells(position, size):
    from metamorph.miniature.world.render import CENTERS

    for shape in SHAPES:
        mask = coverage(shape, size, *CENTERS[position]).reshape(4, 16, 4, 16).sum(axis=(1, 3)).ravel()
        assert sorted(np.flatnonzero(mask)) == cells_of(position)


def test_cell_classes_of_a_known_scene():
    scene = Scene((SceneObject("square", "blue", "small", "top right"),), "grey")
    classes = cell_classes([scene])[0]
    assert classes[2].tolist() == [2, 2, 0, 2, 1]
    assert classes[12].tolist() == [0, IGNORED, IGNORED, IGNORED, 1]


def test_hard_negatives_differ_in_one_attribute_and_are_never_reserved():
    rng = np.random.default_rng(3)
    for _ in range(200):
        scene = sample_scene(rng)
        other = changed_in_one_attribute(scene, rng)
        assert not is_reserved(other)
        differences = (scene.background != other.background) + sum(
            getattr(before, name) != getattr(after, name)
            for before, after in zip(scene.objects, other.objects, strict=True)
            for name in ("shape", "color", "size", "position")
        )
        assert differences == 1


def test_captions_of_a_batch_fit_and_tell_scenes_apart():
    recipe, rng = SiglipRecipe(), np.random.default_rng(4)
    tokenizer = caption_tokenizer(recipe)
    scenes = training_scenes(recipe, rng)
    ids = caption_ids(tokenizer, scenes, recipe, rng)
    assert ids.shape == (recipe.batch_size, recipe.caption_length)
    assert (ids[:, -1] == tokenizer.pad_token_id).all()
    texts = {text: scene_key(scene) for text, scene in zip(map(tuple, ids.tolist()), scenes, strict=True)}
    assert len(set(texts.values())) == len({scene_key(scene) for scene in scenes})


def test_reduced_tokens_are_normalised(tower):
    tokens, pooled = reduced_tokens(tower, torch.zeros(2, 3, 64, 64))
    assert tokens.shape == (2, 16, 128)
    assert pooled.shape == (2, 128)
    torch.testing.assert_close(tokens.norm(dim=-1), torch.ones(2, 16))


def test_the_models_tower_gives_the_same_tokens(tower):
    config = MetaMorphConfig(
        vision_config=tower.config.vision_config.to_dict() | {"model_type": "siglip_vision_model"},
        num_image_tokens=16,
    )
    encoder = load_vision_encoder(str(asset_path("mini-siglip")))
    pixels = scene_pixels([sample_scene(np.random.default_rng(8))])
    with torch.no_grad():
        expected, _ = reduced_tokens(tower, pixels)
        torch.testing.assert_close(VisionTower(config, encoder).eval()(pixels), expected, rtol=0, atol=1e-5)
