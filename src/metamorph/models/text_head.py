"""`lm_head`, and the text loss without the logits of all supervised positions at once.

Logits of 4,096 positions over Llama-3's vocabulary are 2.1 GB in float32, and so is their gradient. The loss is a sum
over positions, so a few hundred at a time will do. It is computed in the forward of the head: engines that shard
parameters gather them when a module is called, and see one call however many chunks there are.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from metamorph.flags.extras import install_command

from .losses import text_loss


TEXT_LOSSES = ("auto", "full", "chunked", "fused", "liger")
"""Values of `--text_loss`, see [`TextLossOptions`]."""
MAX_LOGITS = 2**25
"""Most logits at a time with `auto`: 134 MB in float32, 261 positions of Llama-3's vocabulary."""

LogitsTransform = Callable[[Tensor, Tensor], Tensor]
"""(logits [positions, V], hidden states [positions, H]) -> final logits, for models that scale or cap them."""


@dataclass(frozen=True)
class TextLossOptions:
    """How the text loss is computed. Every way gives the same loss and gradients, up to rounding."""

    kernel: str = "auto"
    """`full`: the logits of all supervised positions. `chunked`: a chunk of positions at a time, whose logits are
    recomputed in the backward pass; the gradient of the weight is summed in float32. `fused`:
    `torch.nn.functional.linear_cross_entropy` (PyTorch 2.13), also in chunks, with their gradients computed at once;
    in float32, because it rounds the summed loss to the dtype of its input. `liger`: the kernel of liger-kernel, on a
    GPU. `auto`: `full` for few logits; otherwise `liger` if it is installed and this is a GPU, `fused` in float32 if
    PyTorch has it, or `chunked`."""
    max_logits: int = MAX_LOGITS
    """Logits at a time, except with `full` and `liger`."""

    def chunk_size(self, vocabulary: int) -> int:
        """Positions at a time."""
        return max(1, self.max_logits // vocabulary)


class TextHead(nn.Linear):
    """The language model's head [..., H] -> [..., V], or, called with labels, the summed cross-entropy."""

    @classmethod
    def from_linear(cls, head: nn.Module) -> nn.Module:
        """Share the parameters of `head`; modules that are not exactly `nn.Linear` are returned unchanged."""
        if type(head) is not nn.Linear:
            return head
        new = cls(head.in_features, head.out_features, bias=head.bias is not None, device="meta")
        new.weight, new.bias = head.weight, head.bias
        return new.train(head.training)

    def forward(
        self,
        hidden_states: Tensor,
        labels: Tensor | None = None,
        options: TextLossOptions | None = None,
        transform: LogitsTransform | None = None,
        transform_weights: tuple[nn.Parameter, ...] = (),
    ) -> Tensor:
        """Compute [..., V] logits, or with `labels` [positions] the summed cross-entropy, 0-d, float32.

        `transform` changes the logits before the softmax, and `transform_weights` are parameters that it uses.
        """
        if labels is None:
            return super().forward(hidden_states)
        options = options or TextLossOptions()
        kernel = choose_kernel(self, hidden_states, options, transform)
        if kernel == "fused":
            return _fused_loss(self, hidden_states, labels, options.chunk_size(self.out_features))
        if kernel == "liger":
            return _liger_loss(self, hidden_states, labels)

        def loss(hidden: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            logits = F.linear(hidden, weight, bias)
            return text_loss(logits if transform is None else transform(logits, hidden), labels).sum

        if kernel == "full":
            return loss(hidden_states, labels, self.weight, self.bias)
        size = options.chunk_size(self.out_features)
        return _ChunkedLoss.apply(loss, size, labels, hidden_states, self.weight, self.bias, *transform_weights)


def choose_kernel(
    head: TextHead, hidden_states: Tensor, options: TextLossOptions, transform: LogitsTransform | None = None
) -> str:
    """Resolve `options.kernel` for [positions, H] hidden states; only `full` and `chunked` can apply `transform`."""
    positions = hidden_states.shape[0]
    if positions == 0:
        return "full"
    if options.kernel in ("full", "chunked"):
        return options.kernel
    if transform is not None:
        return "chunked"
    if options.kernel != "auto":
        return options.kernel
    if positions * head.out_features <= options.max_logits:
        return "full"
    if hidden_states.device.type == "cuda" and has_liger():
        return "liger"
    return "fused" if _compute_dtype(hidden_states) == torch.float32 and has_fused() else "chunked"


def check_text_loss(kernel: str, *, half_precision: bool) -> None:
    """Raise a `ValueError` if `--text_loss` is unknown or not available here, before anything is loaded."""
    if kernel not in TEXT_LOSSES:
        raise ValueError(f"--text_loss {kernel} is unknown: use one of {', '.join(TEXT_LOSSES)}")
    if kernel == "fused" and not has_fused():
        raise ValueError(f"--text_loss fused needs PyTorch 2.13 or newer, this is {torch.__version__}: use chunked")
    if kernel == "fused" and half_precision:
        raise ValueError(
            "--text_loss fused is for float32 (--bf16 False): in half precision PyTorch's operator rounds the summed "
            "loss; use chunked or auto"
        )
    if kernel == "liger" and not (has_liger() and torch.cuda.is_available()):
        raise ValueError(f"--text_loss liger needs a CUDA GPU and liger-kernel: {install_command('liger')}")


def has_fused() -> bool:
    """Whether this PyTorch has a fused linear cross-entropy."""
    return hasattr(F, "linear_cross_entropy") and hasattr(nn, "LinearCrossEntropyOptions")


def has_liger() -> bool:
    """Whether liger-kernel is installed."""
    return importlib.util.find_spec("liger_kernel") is not None


class _ChunkedLoss(torch.autograd.Function):
    """The loss chunk by chunk, forward and again backward, with the weights' gradients summed in float32.

    Autograd would sum the gradients of all chunks in the dtype of the computation, bfloat16 under autocast, and
    lose precision with every chunk.
    """

    @staticmethod
    def forward(
        ctx: Any,
        loss: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
        size: int,
        labels: Tensor,
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *transform_weights: nn.Parameter,
    ) -> Tensor:
        ctx.loss, ctx.size, ctx.transform_weights = loss, size, transform_weights
        ctx.autocast = torch.is_autocast_enabled(hidden_states.device.type)
        ctx.dtype = _compute_dtype(hidden_states)
        # The original weights: copies in the dtype of the computation would stay in memory until the backward pass.
        ctx.save_for_backward(labels, hidden_states, weight, bias)
        weight, bias = weight.to(ctx.dtype), None if bias is None else bias.to(ctx.dtype)
        total = torch.zeros((), device=hidden_states.device)
        for part, part_labels in zip(hidden_states.split(size), labels.split(size), strict=True):
            total += loss(part, part_labels, weight, bias)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        labels, hidden_states, weight, bias = ctx.saved_tensors
        originals = (hidden_states, weight, bias, *ctx.transform_weights)
        wanted = [index for index, needed in enumerate(ctx.needs_input_grad[3:]) if needed]
        weight, bias = (
            None if value is None else value.detach().to(ctx.dtype).requires_grad_(needed)
            for value, needed in zip((weight, bias), ctx.needs_input_grad[4:6], strict=True)
        )
        hidden_gradients: list[Tensor] = []
        sums: dict[int, Tensor] = {}
        for part, part_labels in zip(hidden_states.split(ctx.size), labels.split(ctx.size), strict=True):
            part = part.detach().requires_grad_(0 in wanted)
            with torch.enable_grad(), torch.autocast(part.device.type, ctx.dtype, ctx.autocast, cache_enabled=False):
                loss = ctx.loss(part, part_labels, weight, bias)
            values = (part, weight, bias, *ctx.transform_weights)
            gradients = torch.autograd.grad(loss, [values[index] for index in wanted], gradient)
            for index, value in zip(wanted, gradients, strict=True):
                if index == 0:
                    hidden_gradients.append(value)
                elif index in sums:
                    sums[index] += value
                else:
                    sums[index] = value.float()
        results: dict[int, Tensor] = {index: total.to(originals[index].dtype) for index, total in sums.items()}
        if hidden_gradients:
            results[0] = torch.cat(hidden_gradients)
        return None, None, None, *(results.get(index) for index in range(len(originals)))


def _compute_dtype(hidden_states: Tensor) -> torch.dtype:
    device = hidden_states.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_states.dtype


def _fused_loss(head: TextHead, hidden_states: Tensor, labels: Tensor, chunk_size: int) -> Tensor:
    # With its default chunk size the operator took 31 s for 1,024 positions on a CPU.
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=chunk_size, chunking_method=None)
    bias = None if head.bias is None else head.bias.float()
    with torch.autocast(hidden_states.device.type, enabled=False):
        return F.linear_cross_entropy(
            hidden_states.float(), head.weight.float(), labels, linear_bias=bias, reduction="sum", options=options
        )


def _liger_loss(head: TextHead, hidden_states: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # needs Triton

    dtype = _compute_dtype(hidden_states)
    bias = None if head.bias is None else head.bias.to(dtype)
    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum", accum_dtype=torch.float32)
    return loss(head.weight.to(dtype), hidden_states.to(dtype), labels, bias).float()
