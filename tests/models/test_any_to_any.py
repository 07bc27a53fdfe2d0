"""Transformers' any-to-any pipeline, run without torchvision, which only its constructor asks for."""

import pytest
import torch
from PIL import Image
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
from transformers.pipelines.any_to_any import AnyToAnyPipeline
from transformers.pipelines.base import Pipeline

import metamorph
from metamorph.inference import SamplerSettings, draw


DRAW = "draw a large red circle"


class WithoutTorchvision(AnyToAnyPipeline):
    """The pipeline past the check of its constructor for torchvision, which nothing else here uses."""

    def __init__(self, *args, **kwargs) -> None:
        Pipeline.__init__(self, *args, **kwargs)
        self.check_model_type(MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES)


@pytest.fixture(scope="module")
def session() -> metamorph.inference.Session:
    return metamorph.load("mini", "mini", device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def pipe(session) -> AnyToAnyPipeline:
    pipe = WithoutTorchvision(
        model=session.model,
        processor=session.processor,
        task="any-to-any",
        device="cpu",
        do_sample=False,
        eos_token_id=session.processor.end_of_turn_token_ids,
    )
    pipe.model.visualizer = lambda tokens: draw(session.visualizer, tokens, SamplerSettings(num_inference_steps=2))
    return pipe


def chat(text: str, *images: Image.Image) -> list[dict]:
    parts = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}]
    return [{"role": "user", "content": parts}]


def test_text_equals_our_own_call(session, pipe) -> None:
    image = Image.new("RGB", (64, 64), "white")
    own = session.reply("\nhow many objects are there?", [image])
    (answer,) = pipe(text=chat("\nhow many objects are there?", image), return_full_text=False)
    assert answer["generated_text"].strip() == own.text != ""
    (answer,) = pipe(text=chat("\nhow many objects are there?", image))
    assert answer["generated_text"][-1]["content"].strip() == own.text


def test_images_equal_our_own_calls(session, pipe) -> None:
    """Of a chat, and of prompts in one batch, each of which gets its own image, whatever follows it."""
    settings = SamplerSettings(num_inference_steps=2)
    (drawn,) = pipe(text=chat(DRAW), generation_mode="image")
    own = session.reply(DRAW, draw=True, settings=settings)
    assert drawn["generated_image"].tobytes() == own.images[0].tobytes()
    texts = ("draw a small blue square", DRAW)
    prompts = [
        session.processor.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
        for text in texts
    ]
    together = pipe(text=prompts, generation_mode="image")
    assert [each["input_text"] for each in together] == prompts
    own = torch.cat([session.reply(text, draw=True, settings=settings).visual_tokens[:1] for text in texts])
    difference = levels([each["generated_image"] for each in together]) - levels(
        draw(session.visualizer, own, settings)
    )
    assert difference.abs().max() <= 2


def levels(images: list[Image.Image]) -> torch.Tensor:
    return torch.stack([torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8) for image in images]).float()


def test_what_does_not_fit_is_refused(session, pipe) -> None:
    assert pipe.model.output_modalities == ("image", "text")
    with pytest.raises(ValueError, match="generation_mode=audio"):
        pipe(text=chat(DRAW), generation_mode="audio")
    with pytest.raises(ValueError, match="generation_mode 'video' is not one of image, text"):
        session.model.generate(torch.tensor([[1]]), generation_mode="video")
    with pytest.raises(ValueError, match="ended an answer within its image"):
        session.model.generate(torch.tensor([[1]]), generation_mode="image", max_time=0.0)
    without = metamorph.load("mini", device="cpu").model
    assert not without.generate(torch.tensor([[1]]), generation_mode="text", max_new_tokens=2).num_images.any()
    with pytest.raises(ValueError, match="there is no visualizer"):
        without.decode_image_tokens(torch.zeros(1, 1, 64, 8))
    without.config.use_vision_ar = False
    assert without.output_modalities == ("text",)
