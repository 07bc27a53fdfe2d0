"""What only a GPU can show: no waiting in our code, kernels of other packages, compiled layers."""

import warnings
from pathlib import Path

import pytest
import torch
from batch_parts import collate
from model_parts import build_batch, build_tiny_model

import metamorph
from metamorph.models.text_head import TextHead, TextLossOptions, has_liger
from metamorph.training.engines.speed import compile_layers


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def to_gpu(value):
    if isinstance(value, dict):
        return {name: to_gpu(item) for name, item in value.items()}
    return value.cuda() if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("packed", [False, True])
def test_r06_our_code_never_waits_for_the_gpu(packed):
    """PyTorch warns at every line that waits; one of Transformers, which looks at padded rows, is not ours."""
    model = build_tiny_model().train().cuda()
    batch = to_gpu(collate(model.config, packed, model.config.image_token_id))
    normalizers = (torch.tensor(11.0, device="cuda"), torch.tensor(4.0, device="cuda"))
    model(**batch, loss_normalizers=normalizers).loss.backward()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model(**batch, loss_normalizers=normalizers).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [Path(warning.filename) for warning in caught if "synchroniz" in str(warning.message)]
    assert not [place for place in waits if packed or place.is_relative_to(Path(metamorph.__file__).parent)]


@pytest.mark.parametrize(
    "kernel",
    ["chunked", pytest.param("liger", marks=pytest.mark.skipif(not has_liger(), reason="needs liger-kernel"))],
)
def test_text_loss_in_bfloat16(kernel):
    torch.manual_seed(0)
    head = TextHead(64, 1000, bias=False, device="cuda")
    hidden = torch.randn(300, 64, device="cuda")
    labels = torch.randint(0, 1000, (300,), device="cuda")
    results = []
    for options in (TextLossOptions("full"), TextLossOptions(kernel, max_logits=64_000)):
        head.zero_grad()
        inputs = hidden.clone().requires_grad_()
        with torch.autocast("cuda", torch.bfloat16):
            loss = head(inputs, labels, options)
        loss.backward()
        results.append((loss.detach(), inputs.grad, head.weight.grad))
    (loss, *gradients), (found, *found_gradients) = results
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, loss, rtol=1e-3, atol=0)
    for ours, theirs in zip(found_gradients, gradients, strict=True):
        assert torch.nn.functional.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.999


@pytest.mark.slow
def test_compiled_layers_give_the_same():
    plain, compiled = build_tiny_model().train().cuda(), build_tiny_model().train().cuda()
    compile_layers(compiled)
    batch = to_gpu(build_batch(plain.config))
    torch.testing.assert_close(compiled(**batch).loss, plain(**batch).loss, rtol=1e-4, atol=1e-5)


def test_flex_attention_of_packed_rows_gives_the_same():
    results = []
    for kernel in ("sdpa", "flex_attention"):
        model = (
            build_tiny_model(text_config={"hidden_size": 64, "num_attention_heads": 4, "head_dim": 16}).train().cuda()
        )
        model.packed_kernel = kernel
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(**to_gpu(collate(model.config, True, model.config.image_token_id))).loss
        loss.backward()
        results.append((loss.detach(), model.get_input_embeddings().weight.grad))
    (loss, gradient), (found, found_gradient) = results
    torch.testing.assert_close(found, loss, rtol=1e-2, atol=0)
    assert torch.nn.functional.cosine_similarity(found_gradient.flatten(), gradient.flatten(), dim=0) > 0.99
