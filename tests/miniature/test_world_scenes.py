"""The miniature world draws what it says, and its checker reads back what was drawn."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from metamorph.miniature.world.checker import judge, read_image
from metamorph.miniature.world.render import render, render_array
from metamorph.miniature.world.scenes import (
    COLORS,
    CORNERS,
    HELD_OUT,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    is_reserved,
    sample_scene,
    single_scenes,
)


RED_CIRCLE = SceneObject("circle", "red", "large", "center")


def test_checker_reads_every_single_scene_exactly() -> None:
    rng = np.random.default_rng(0)
    for scene in single_scenes():
        assert read_image(render(scene)).scene == scene
        assert judge(render(scene, rng), scene).all


def test_checker_reads_pairs() -> None:
    rng = np.random.default_rng(1)
    scenes = [sample_scene(rng, num_objects=2, reserved=None) for _ in range(300)]
    right = sum(judge(render(scene, rng), scene).all for scene in scenes)
    assert right >= 0.99 * len(scenes)


def test_checker_tolerates_noise() -> None:
    rng = np.random.default_rng(2)
    scenes = [sample_scene(rng) for _ in range(100)]
    noisy = [
        np.clip(render_array(scene, rng) + rng.normal(0, 15, (64, 64, 3)), 0, 255).astype(np.uint8) for scene in scenes
    ]
    assert sum(judge(image, scene).all for image, scene in zip(noisy, scenes, strict=True)) >= 99


@pytest.mark.parametrize(
    ("attribute", "value"),
    [("color", "blue"), ("shape", "square"), ("size", "small"), ("position", "top left")],
)
def test_verdict_names_exactly_the_wrong_attribute(attribute: str, value: str) -> None:
    other = SceneObject(**{**vars(RED_CIRCLE), attribute: value})
    verdict = judge(render(Scene((other,))), Scene((RED_CIRCLE,)))
    wrong = {name for name in ("color", "shape", "size", "position") if not getattr(verdict, name)}
    assert wrong == {attribute}
    assert not verdict.all


def test_wrong_count_is_wrong() -> None:
    one = SceneObject("cross", "black", "small", "top left")
    two = SceneObject("square", "green", "large", "bottom right")
    assert not judge(render(Scene((one, two))), Scene((one,))).all
    missing = judge(render(Scene((one,))), Scene((one, two)))
    assert not any((missing.count, missing.color, missing.all))
    empty = judge(Image.new("RGB", (64, 64), "white"), Scene((one,)))
    assert not any((empty.count, empty.color, empty.shape))


@pytest.mark.parametrize("corner", CORNERS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", SHAPES)
def test_object_next_to_the_centre_object_is_counted(shape: str, size: str, corner: str) -> None:
    center = Scene((SceneObject(shape, "red", size, "center"),))
    for other in SHAPES:
        for color in ("red", "blue"):
            extra = render_array(Scene((SceneObject(other, color, "small", corner),)))
            image = np.where(extra < 255, extra, render_array(center))
            verdict = judge(image, center)
            assert not verdict.count, (other, color)
            assert not verdict.all
            assert read_image(image).scene is None


def test_swapped_colours_of_a_pair_are_wrong() -> None:
    drawn = Scene(
        (SceneObject("circle", "red", "large", "top left"), SceneObject("square", "blue", "large", "top right"))
    )
    wanted = Scene(
        (SceneObject("circle", "blue", "large", "top left"), SceneObject("square", "red", "large", "top right"))
    )
    verdict = judge(render(drawn), wanted)
    assert not verdict.color or not verdict.position
    assert not verdict.all


def test_blob_has_no_shape() -> None:
    image = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(image).rectangle((26, 16, 38, 48), fill=(214, 39, 40))
    (found,) = read_image(image).objects
    assert found.color == "red"
    assert found.shape is None
    assert read_image(image).scene is None


def test_checker_refuses_other_sizes() -> None:
    with pytest.raises(ValueError, match="64×64"):
        read_image(Image.new("RGB", (32, 64)))


def test_order_of_objects_does_not_change_image_or_reservation() -> None:
    scene = sample_scene(np.random.default_rng(3), num_objects=2)
    turned = Scene(scene.objects[::-1], scene.background)
    assert np.array_equal(render_array(scene), render_array(turned))
    assert is_reserved(scene) == is_reserved(turned)


def test_scene_survives_json_form() -> None:
    scene = sample_scene(np.random.default_rng(4), num_objects=2)
    assert Scene.from_dict(scene.to_dict()) == scene


def test_samples_keep_their_promises() -> None:
    rng = np.random.default_rng(5)
    for _ in range(200):
        assert not is_reserved(sample_scene(rng))
        assert is_reserved(sample_scene(rng, reserved=True))
        assert not sample_scene(rng, allow_held_out=False).has_held_out


def test_seven_pairs_are_held_out_one_per_colour() -> None:
    assert len(HELD_OUT) == 7
    assert {color for color, _ in HELD_OUT} == set(COLORS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("star", "red", "large", "center"), "shape='star' is not one of 'circle'"),
        (("circle", "pink", "large", "center"), "color='pink'"),
        (("circle", "red", "huge", "center"), "size='huge'"),
        (("circle", "red", "large", "left"), "position='left'"),
    ],
)
def test_unknown_words_are_refused(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SceneObject(*arguments)


def test_objects_that_would_overlap_are_refused() -> None:
    corner = SceneObject("square", "red", "small", "top left")
    with pytest.raises(ValueError, match="in different corners"):
        Scene((RED_CIRCLE, corner))
    with pytest.raises(ValueError, match="in different corners"):
        Scene((corner, corner))
    with pytest.raises(ValueError, match="one to three objects"):
        Scene(())
