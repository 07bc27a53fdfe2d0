"""Recomputation, compilation and the frozen tower: faster or smaller, and the same numbers."""

import pytest
import torch
from model_parts import build_batch, build_tiny_model
from torch.utils.flop_counter import FlopCounterMode

from metamorph.training.arguments import MetaMorphTrainingArguments
from metamorph.training.engines.speed import compile_layers, prepare_speed, recompute_layers


def step(model) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of one batch."""
    model.train().zero_grad()
    loss = model(**build_batch(model.config)).loss
    loss.backward()
    return loss.detach(), {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def check_same(ours: dict[str, torch.Tensor], plain: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == plain.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("tower_trained", [False, True])
@pytest.mark.parametrize("selective", [False, True])
def test_recomputation_gives_the_same(selective, tower_trained):
    def build():
        model = build_tiny_model(text_config={"num_hidden_layers": 3})
        model.model.vision_tower.requires_grad_(tower_trained)
        return model

    with FlopCounterMode(display=False) as plain:
        loss, gradients = step(build())
    model = build()
    recompute_layers(model, selective=selective)
    with FlopCounterMode(display=False) as counter:
        found, found_gradients = step(model)
    assert torch.equal(found, loss)
    check_same(found_gradients, gradients)
    # Selective recomputation repeats no matrix product; full repeats those of the decoder's layers.
    ours, theirs = counter.get_total_flops(), plain.get_total_flops()
    assert ours == theirs if selective else ours > 1.1 * theirs


def test_recomputation_makes_no_gradient_flow_through_a_frozen_decoder():
    model = build_tiny_model().train().requires_grad_(False)
    model.vision_head.requires_grad_(True)
    recompute_layers(model, selective=False)
    assert not model.get_input_embeddings()(torch.tensor([[1, 2]])).requires_grad


def test_compiled_layers_give_the_same():
    """By the ahead-of-time tracer without code generation, which would take minutes here."""
    plain, model = build_tiny_model(), build_tiny_model()
    names = list(model.state_dict())
    compile_layers(model, backend="aot_eager")
    assert list(model.state_dict()) == names
    loss, gradients = step(plain)
    found, found_gradients = step(model)
    torch.testing.assert_close(found, loss, rtol=1e-6, atol=0)
    check_same(found_gradients, gradients)


def test_frozen_tower_gives_the_visual_tokens_of_a_trained_one():
    """It runs in inference mode; its output may still be kept for a backward pass."""
    model = build_tiny_model()
    pixels = build_batch(model.config)["pixel_values"]
    expected = model.get_visual_tokens(pixels)
    assert expected.requires_grad
    model.model.vision_tower.requires_grad_(False)
    found = model.get_visual_tokens(pixels)
    assert torch.equal(found, expected)
    assert not found.is_inference()
    assert not found.requires_grad


def test_flags_are_applied_once(tmp_path):
    args = MetaMorphTrainingArguments(
        output_dir=str(tmp_path), recompute="selective", text_loss="chunked", torch_compile_backend="aot_eager"
    )
    assert args.torch_compile  # by Transformers, as soon as a backend is named
    model = build_tiny_model()
    prepare_speed(model, args)
    assert model.text_loss_options.kernel == "chunked"
    assert all(layer.gradient_checkpointing for layer in model.get_decoder().layers)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"text_loss": "fast"}, "--text_loss 'fast' is unknown: use one of auto, full, chunked, fused, liger"),
        ({"text_loss": "fused"}, "--text_loss fused (is for float32|needs PyTorch 2.13)"),
        ({"recompute": "some"}, "--recompute"),
    ],
)
def test_bad_values_are_refused_at_once(flags, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        MetaMorphTrainingArguments(output_dir=str(tmp_path), **flags)
