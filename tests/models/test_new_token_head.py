"""The head of adapters: it gives what a plain head with the new rows in it would, loss and gradients included."""

import pytest
import torch

from metamorph.models.embeddings import NewTokenHead
from metamorph.models.text_head import TextHead, TextLossOptions


VOCABULARY, HIDDEN, NEW = 37, 8, [30, 36]
OPTIONS = [TextLossOptions("full"), TextLossOptions("chunked", max_logits=3 * VOCABULARY), TextLossOptions("fused")]


def make_heads(*, bias: bool) -> tuple[NewTokenHead, TextHead]:
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
def test_logits(bias: bool) -> None:
    head, plain = make_heads(bias=bias)
    hidden = torch.randn(2, 5, HIDDEN)
    torch.testing.assert_close(head(hidden), plain(hidden))


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: options.kernel)
@pytest.mark.parametrize("bias", [False, True])
def test_loss_and_gradients(options: TextLossOptions, bias: bool) -> None:
    head, plain = make_heads(bias=bias)
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
