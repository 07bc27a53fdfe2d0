"""The text loss in parts is the text loss: every way to compute it, against the logits of all positions."""

import copy

import pytest
import torch
from model_parts import build_batch, build_tiny_model
from torch import nn

from metamorph.models.embeddings import NewTokenHead, attach_new_token_rows
from metamorph.models.text_head import TextHead, TextLossOptions, choose_kernel, has_fused


VOCABULARY, HIDDEN, NEW = 37, 8, [30, 36]
PARTS = TextLossOptions("chunked", max_logits=3 * VOCABULARY)
FUSED = TextLossOptions("fused", max_logits=3 * VOCABULARY)
needs_fused = pytest.mark.skipif(not has_fused(), reason="PyTorch before 2.13 has no linear_cross_entropy")
KERNELS = [PARTS, pytest.param(FUSED, marks=needs_fused)]


def make_head(*, bias: bool, trained: bool = True) -> TextHead:
    torch.manual_seed(0)
    head = TextHead(HIDDEN, VOCABULARY, bias=bias)
    return head.requires_grad_(trained)


def run(head: TextHead, options: TextLossOptions, finish=None, positions: int = 10) -> list[torch.Tensor | None]:
    """Loss, and gradients of hidden states, weight and bias."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(positions, HIDDEN, generator=generator).requires_grad_()
    labels = torch.randint(0, VOCABULARY, (positions,), generator=generator)
    head.zero_grad()
    loss = head(hidden, labels, options, finish)
    (loss / 7).backward()
    return [loss.detach(), hidden.grad, *[parameter.grad for parameter in head.parameters()]]


@pytest.mark.parametrize("options", KERNELS, ids=lambda options: options.kernel)
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("bias", [False, True])
def test_parts_give_the_loss_of_the_whole(options, bias, trained):
    head = make_head(bias=bias, trained=trained)
    for found, expected in zip(run(head, options), run(head, TextLossOptions("full")), strict=True):
        assert (found is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_parts_of_changed_logits():
    head = make_head(bias=False)

    def cap(logits, hidden):
        return torch.tanh(logits / 2) * 2

    full = run(head, TextLossOptions("full"), cap)
    for found, expected in zip(run(head, PARTS, cap), full, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_parts_in_bfloat16():
    """The products are in bfloat16, the sum of the losses is not."""
    head = make_head(bias=False)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = run(head, PARTS), run(head, TextLossOptions("full"))
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(found[1], expected[1])
    torch.testing.assert_close(found[2], expected[2], rtol=2e-2, atol=1e-3)  # parts are summed in float32


@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_of_many_parts_lose_no_more_than_that_of_the_whole(autocast):
    """They are summed in float32: the error against float32 is that of one rounding, however many parts there are."""
    vocabulary, hidden, positions = 500, 64, 1024
    torch.manual_seed(0)
    head = TextHead(hidden, vocabulary, bias=True)
    states, labels = 2 * torch.randn(positions, hidden), torch.randint(0, 50, (positions,))

    def gradient(dtype, options):
        model = copy.deepcopy(head).to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.float32 and options is not reference):
            model(states.to(dtype), labels, options).backward()
        assert model.weight.grad.dtype == dtype
        return model.weight.grad.float()

    reference = TextLossOptions("full")
    exact = gradient(torch.float32, reference)
    dtype = torch.float32 if autocast else torch.bfloat16
    one, many = (gradient(dtype, TextLossOptions("chunked", size * vocabulary)) for size in (positions, 16))
    assert torch.equal(one, gradient(dtype, TextLossOptions("full")))
    errors = [((found - exact).norm() / exact.norm()).item() for found in (one, many)]
    assert errors[1] < 1.3 * errors[0] < 0.01


def test_no_position_costs_nothing_and_reaches_the_weight():
    head = make_head(bias=False)
    loss, _, gradient = run(head, PARTS, positions=0)
    assert loss == 0
    assert not gradient.any()


def test_logits_of_all_positions_are_never_kept():
    """Nothing as large as half of them is saved for the backward pass."""
    head, positions, largest = make_head(bias=False), 40 * HIDDEN, {}
    for options in (PARTS, TextLossOptions("full")):
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda saved, sizes=sizes: sizes.append(saved.numel()) or saved, lambda saved: saved
        ):
            run(head, options, positions=positions)
        largest[options.kernel] = max(sizes)
    assert largest["chunked"] < positions * VOCABULARY / 2
    assert largest["full"] == positions * VOCABULARY


def test_auto_takes_parts_only_where_they_help():
    head = make_head(bias=False)
    few, many = TextLossOptions(max_logits=10 * VOCABULARY), TextLossOptions(max_logits=VOCABULARY)
    hidden = torch.zeros(10, HIDDEN)
    assert choose_kernel(head, hidden, few) == "full"
    assert choose_kernel(head, hidden, many) == ("fused" if has_fused() else "chunked")
    assert choose_kernel(head, hidden, many, transform=lambda logits, hidden: logits) == "chunked"
    assert choose_kernel(head, hidden.bfloat16(), many) == "chunked"  # the fused one would round the loss
    with torch.autocast("cpu", torch.bfloat16):
        assert choose_kernel(head, hidden, many) == "chunked"
    assert TextLossOptions(max_logits=5).chunk_size(VOCABULARY) == 1


def test_head_keeps_parameters_and_names():
    linear = nn.Linear(HIDDEN, VOCABULARY, bias=True)
    head = TextHead.from_linear(linear)
    assert head.weight is linear.weight
    assert head.bias is linear.bias
    assert list(head.state_dict()) == ["weight", "bias"]
    assert TextHead.from_linear(head) is head
    embedding = nn.Embedding(3, 2)
    assert TextHead.from_linear(embedding) is embedding


@pytest.mark.parametrize("options", KERNELS, ids=lambda options: options.kernel)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("scaling", [1.0, 2.0])
def test_model_learns_the_same(options, stage, tied, scaling):
    """Losses and every gradient, the new tokens' rows in a tied head among them, where logits are scaled."""
    results = []
    for text_loss_options in (TextLossOptions("full"), TextLossOptions(options.kernel, max_logits=64 * 3)):
        model = build_tiny_model(text_config={"tie_word_embeddings": tied, "logits_scaling": scaling}).train()
        model.text_loss_options = text_loss_options
        if stage == 1:
            model.requires_grad_(False)
            model.model.mm_projector.requires_grad_(True)
            attach_new_token_rows(model)
        model(**build_batch(model.config)).loss.backward()
        results.append({name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None})
    assert results[0].keys() == results[1].keys()
    assert any("new_rows" in name for name in results[0]) == (stage == 1)
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("alone", [False, True])
def test_parts_in_a_sharded_model(alone, tmp_path):
    """FSDP2 gathers a weight when the module it belongs to is called, `lm_head` by itself or with the model."""
    from torch import distributed
    from torch.distributed.fsdp import fully_shard

    batch = build_batch(build_tiny_model().config)
    plain = build_tiny_model().train()
    plain.text_loss_options = TextLossOptions("full")
    plain(**batch).loss.backward()
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = build_tiny_model().train()
        model.text_loss_options = TextLossOptions("chunked", max_logits=64 * 3)
        if alone:
            fully_shard(model.lm_head)
        fully_shard(model)
        model(**batch).loss.backward()
        assert isinstance(model.lm_head, TextHead)
        gradient = model.lm_head.weight.grad.full_tensor()
    finally:
        distributed.destroy_process_group()
    torch.testing.assert_close(gradient, plain.lm_head.weight.grad, rtol=1e-4, atol=1e-6)


def new_token_heads(*, bias: bool) -> tuple[NewTokenHead, TextHead]:
    """A head with new rows that differ from its own, and a plain head with them in its weight."""
    torch.manual_seed(0)
    plain, frozen = TextHead(HIDDEN, VOCABULARY, bias=bias), TextHead(HIDDEN, VOCABULARY, bias=bias)
    frozen.load_state_dict(plain.state_dict())
    head = NewTokenHead(frozen, NEW)
    with torch.no_grad():
        head.new_rows.add_(torch.randn(len(NEW), HIDDEN))
        plain.weight[NEW] = head.new_rows
    return head, plain


@pytest.mark.parametrize("bias", [False, True])
def test_logits_with_new_rows(bias: bool) -> None:
    head, plain = new_token_heads(bias=bias)
    hidden = torch.randn(2, 5, HIDDEN)
    torch.testing.assert_close(head(hidden), plain(hidden))


@pytest.mark.parametrize("options", [TextLossOptions("full"), *KERNELS], ids=lambda options: options.kernel)
@pytest.mark.parametrize("bias", [False, True])
def test_loss_and_gradients_with_new_rows(options: TextLossOptions, bias: bool) -> None:
    head, plain = new_token_heads(bias=bias)
    labels = torch.arange(10) * 4  # 36 is among them
    hidden = torch.randn(10, HIDDEN).requires_grad_()
    other = hidden.detach().clone().requires_grad_()
    loss, expected = head(hidden, labels, options), plain(other, labels, TextLossOptions("full"))
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(hidden.grad, other.grad)
    torch.testing.assert_close(head.new_rows.grad, plain.weight.grad[NEW])
    assert head.weight.grad is None
    assert [name for name, parameter in head.named_parameters() if parameter.requires_grad] == ["new_rows"]
