"""`metamorph.load`: one object that answers and draws, and reports bad input before it computes."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import metamorph
from metamorph.inference import Prompt, SamplerSettings, draw, reply_to
from metamorph.inference.draw import draw_each
from metamorph.inference.prompt import place_media
from metamorph.models.sequence.conversations import ImagePart, TextPart


@pytest.fixture(scope="module")
def session() -> metamorph.inference.Session:
    return metamorph.load("mini", "mini", device="cpu", dtype=torch.float32)


def test_a_drawing_in_one_call(session) -> None:
    reply = session.reply("Generate an image of a red circle", settings=SamplerSettings(num_inference_steps=2))
    (image,) = reply.images
    assert (reply.num_images, image.mode, image.size) == (1, "RGB", (64, 64))
    (again,) = draw(session.pipeline, reply.visual_tokens, SamplerSettings(num_inference_steps=2))
    assert image.tobytes() == again.tobytes()
    assert [type(part) for part in reply.parts if isinstance(part, ImagePart)] == [ImagePart]


def test_an_answer_in_words_has_no_images(session, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "white").save(tmp_path / "white.png")
    by_path = session.reply("how many objects are there?", [tmp_path / "white.png"])
    assert by_path.text
    assert by_path.images == []
    by_image = session.reply("<image>\nhow many objects are there?", [Image.open(tmp_path / "white.png")])
    assert by_image.text == by_path.text
    assert all(isinstance(part, TextPart) for part in by_path.parts)


def test_an_image_can_be_asked_for(session) -> None:
    """With `draw` the answer begins with an image, in a batch with prompts without it, too."""
    prompts = [Prompt("how are you?", draw=True), Prompt("how are you?"), Prompt("draw a red circle", draw=True)]
    together = reply_to(session.model, session.processor, prompts, max_new_tokens=40)
    assert [type(reply.parts[0]) for reply in together] == [ImagePart, TextPart, ImagePart]
    for prompt, reply in zip(prompts, together, strict=True):
        (alone,) = reply_to(session.model, session.processor, [prompt], max_new_tokens=40)
        assert alone.text == reply.text
        torch.testing.assert_close(alone.visual_tokens, reply.visual_tokens, atol=1e-4, rtol=1e-4)


def test_the_mode_of_the_model_is_left_as_it_was(session) -> None:
    session.model.train()
    reply_to(session.model, session.processor, [Prompt("hello")], max_new_tokens=1)
    assert session.model.training
    session.model.eval()


def test_without_a_visualizer_images_stay_tokens(session, caplog) -> None:
    words = metamorph.inference.Session(session.model, session.processor)
    with caplog.at_level(logging.WARNING):
        reply = words.reply("Generate an image of a red circle")
    assert (reply.num_images, reply.images) == (1, [])
    assert "load a visualizer" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": "/nowhere/x"}, FileNotFoundError, "model /nowhere/x does not exist"),
        ({"model": "mini", "visualizer": "/nowhere/x"}, FileNotFoundError, "visualizer /nowhere/x does not exist"),
        ({"model": "mini", "device": "cuda:99"}, ValueError, "device cuda:99 cannot be used here"),
    ],
)
def test_bad_input_is_named(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        metamorph.load(**arguments)


def test_images_and_frames_are_in_the_order_of_their_markers() -> None:
    assert place_media("see <video> and <image>!", "a", ["bc"]) == ("see <image><image> and <image>!", tuple("bca"))
    assert place_media("Compare.", "a", ["bc", "d"]) == ("<image>\n<image><image>\n<image>\nCompare.", tuple("abcd"))
    assert place_media("<image>, then this", "a", ["b"]) == ("<image>\n<image>, then this", tuple("ba"))
    assert place_media("Is <image> blue?", "a") == ("Is <image> blue?", ("a",))
    for prompt, message in (
        ("Is <image> blue?", "has 1 <image> markers, but there are 2 image"),
        ("Is <video> blue?", "has 1 <video> markers, but there are 0 video"),
    ):
        with pytest.raises(ValueError, match=message):
            place_media(prompt, "ab")


def test_drawings_of_each_image_have_their_own_seeds(session) -> None:
    """Drawing `k` of image `i` starts from seed + i + k, alone as in a batch."""
    tokens = torch.stack([session.reply(f"draw a {color} circle").visual_tokens[0] for color in ("red", "blue")])
    settings = SamplerSettings([1.0, 3.0], 1, seed=5, num_images=2)
    assert settings.of_image(1).drawings == [(6, 1.0), (6, 3.0), (7, 1.0), (7, 3.0)]
    found = draw_each(session.pipeline, tokens, settings)
    assert [len(each) for each in found] == [4, 4]
    (alone,) = draw(session.pipeline, tokens[1], SamplerSettings(3.0, 1, seed=7))
    difference = np.asarray(found[1][3], dtype=int) - np.asarray(alone)
    assert np.abs(difference).max() <= 2
