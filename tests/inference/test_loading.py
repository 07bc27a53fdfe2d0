"""`metamorph.load`: dtypes, device maps, quantised weights and compiled steps give the same answers, or are refused."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from model_parts import build_tiny_model, image_ids
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import BitsAndBytesConfig, StaticCache

import metamorph
from metamorph.cli import main
from metamorph.inference import Prompt, Sampling, reply_to


DRAW = "draw a large red circle"
QUESTION = "what color is the object?"


@pytest.fixture(scope="module")
def session() -> metamorph.inference.Session:
    return metamorph.load("mini", device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def compiled() -> metamorph.inference.Session:
    """Compiled by Dynamo without Inductor, which would take a minute."""
    session = metamorph.load("mini", device="cpu", dtype=torch.float32, torch_compile=True)
    session.model.generation_config.compile_config.backend = "eager"
    session.model.generation_config.compile_config.mode = None
    return session


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.bfloat16, "device": "cpu"},
        {"dtype": torch.float32, "device_map": "auto"},
        {"quantization_config": BitsAndBytesConfig(load_in_4bit=True), "device": "cpu"},
        {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "device": "cpu"},
    ],
    ids=["bfloat16", "device map", "4 bits", "8 bits"],
)
def test_other_weights_give_the_same_answers(session, options: dict) -> None:
    if "quantization_config" in options:
        pytest.importorskip("bitsandbytes", reason="needs the extra lora")
    loaded = metamorph.load("mini", **options)
    quantised = [name for name, module in loaded.model.named_modules() if "bit" in type(module).__name__]
    assert bool(quantised) == ("quantization_config" in options)
    assert all(name.startswith("model.language_model.") for name in quantised)
    own, other = (each.reply(DRAW, draw=True, max_new_tokens=60) for each in (session, loaded))
    assert own.num_images == other.num_images == 1
    assert torch.cosine_similarity(own.visual_tokens, other.visual_tokens, dim=-1).mean() > 0.98
    image = Image.new("RGB", (64, 64), "red")
    assert loaded.reply(QUESTION, [image]).text == session.reply(QUESTION, [image]).text


def test_compiled_steps_give_the_same_answers(session, compiled) -> None:
    prompts = [
        Prompt(DRAW, draw=True),
        Prompt("hello", sampling=Sampling(1.0, seed=1)),
        Prompt("hello", max_new_tokens=3),
    ]
    compiled_calls = []
    compile_step = compiled.model.get_compiled_call
    compiled.model.get_compiled_call = lambda config: compiled_calls.append(config) or compile_step(config)
    for batch_size in (1, 3):
        own, other = (
            reply_to(each.model, each.processor, prompts, batch_size=batch_size, max_new_tokens=70)
            for each in (session, compiled)
        )
        for left, right in zip(own, other, strict=True):
            assert (left.text, left.num_tokens, left.finish_reason) == (
                right.text,
                right.num_tokens,
                right.finish_reason,
            )
            torch.testing.assert_close(left.visual_tokens, right.visual_tokens, atol=1e-4, rtol=1e-4)
    assert len(compiled_calls) >= 4


def test_a_chat_of_compiled_steps_keeps_its_cache(session, compiled) -> None:
    """Also after a turn was undone, and when the conversation outgrows the cache."""
    chats = [each.chat() for each in (session, compiled)]
    lengths = []
    layers = compiled.model.model.language_model.layers
    hook = layers[0].register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    replies = [[chat.reply(text, max_new_tokens=70) for text in (DRAW, "what color is it?")] for chat in chats]
    first, second = replies[1]
    prompts = [length for length in lengths if length > 1]
    assert prompts[0] == first.num_prompt_tokens
    assert prompts[1] < second.num_prompt_tokens - first.num_prompt_tokens
    assert isinstance(chats[1]._cache._cache, StaticCache)
    replies = [
        [*own, chat.retry(max_new_tokens=20), chat.reply("hello", max_new_tokens=500)]
        for own, chat in zip(replies, chats, strict=True)
    ]
    hook.remove()
    for own, other in zip(*replies, strict=True):
        assert own.text == other.text
        torch.testing.assert_close(own.visual_tokens, other.visual_tokens, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_parts_may_be_on_several_devices() -> None:
    """Fake tensors compute no values, but refuse to mix devices, as real ones do."""
    with torch.device("meta"):
        model = build_tiny_model().requires_grad_(False)
    ids = torch.tensor([[1, 7, *image_ids(model.config), 9, model.config.image_token_id]])
    positions = (ids == model.config.image_token_id).flatten().nonzero().squeeze(1)[:-1]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for name, device in (("model.language_model.embed_tokens", "cpu"), ("model.mm_projector", "cuda:0")):
            part = model.get_submodule(name).to_empty(device=device)
            part.register_forward_pre_hook(partial(move_inputs, device), with_kwargs=True)  # as Accelerate does
        images, generated = (torch.zeros(1, count, 24, device="cuda:0") for count in (4, 1))
        embeds = model.model.embed(mode.from_tensor(ids[:, -1:]), None, generated)
        assert (embeds.device, embeds.shape) == (torch.device("cpu"), (1, 1, 32))
        embeds = model.model.embed(mode.from_tensor(ids), images, None, mode.from_tensor(positions))
        assert (embeds.device, embeds.shape) == (torch.device("cpu"), (1, 10, 32))


def move_inputs(device: str, module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    return tuple(value.to(device) for value in args), kwargs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device_map": "auto", "device": "cpu"}, "device_map and device exclude each other"),
        ({"device_map": "auto", "torch_compile": True}, "device_map and torch_compile exclude each other"),
        (
            {"torch_compile": True, "quantization_config": BitsAndBytesConfig(load_in_8bit=True)},
            "torch_compile does not work with 4-bit and 8-bit weights",
        ),
    ],
)
def test_what_excludes_each_other_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metamorph.load("mini", **options)


def test_the_output_of_stage_1_is_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "metamorph"}))
    with pytest.raises(FileNotFoundError, match="has no model weights: give the output of stage 2"):
        metamorph.load(tmp_path)
    (tmp_path / "mm_projector.safetensors").touch()
    with pytest.raises(FileNotFoundError, match=f"the output of stage 1. Train stage 2 with .*adapter {tmp_path},"):
        metamorph.load(tmp_path)


def test_flags_of_loading(tmp_path: Path, capsys) -> None:
    arguments = ["generate", "--model", "mini", "--prompt", QUESTION, "--max-new-tokens", "3", "--dtype", "float32"]
    assert main([*arguments, "--device-map", "auto"]) == 0
    expected = capsys.readouterr().out
    assert main([*arguments, "--device", "cpu", "--load-in-8bit"]) == 0
    assert capsys.readouterr().out == expected
    assert main([*arguments, "--device-map", "auto", "--device", "cpu"]) != 0
    assert "--device-map and --device exclude each other" in capsys.readouterr().err
