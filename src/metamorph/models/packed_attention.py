"""Attention within the samples of packed rows, by boundaries that the host knows instead of a mask over all positions.

Transformers passes 4-D masks through as they are. The masks made here take no memory for pairs of positions, let
attention skip what lies outside of a sample, and never read values from a GPU, for which the host would wait.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel


PackedKernel = Literal["sdpa", "flex_attention"]
"""What computes packed rows where the language model uses SDPA: its causal kernel for each sample, or one of blocks."""


def mask_of_samples(
    decoder: PreTrainedModel, spans: list[list[int]], device: torch.device, kernel: PackedKernel = "sdpa"
) -> Tensor | BlockMask | None:
    """The causal mask for packed rows, or None where Transformers should make it.

    `spans` are the lengths of the samples of each row, padding included. Transformers makes the mask for attention
    implementations that need none or a dense one, for sliding windows, and for layers that are not attention.
    """
    # Transformers takes another path for a single query, which needs no mask.
    if not _attends_to_entire_samples(decoder) or sum(spans[0]) == 1:
        return None
    attention = decoder.config._attn_implementation
    if attention == "sdpa":
        return SampleMask.of(spans, device, _block_mask(spans, device) if kernel == "flex_attention" else None)
    return _block_mask(spans, device) if attention == "flex_attention" else None


class SampleMask(Tensor):
    """A bool mask [B, 1, S, S], with which `scaled_dot_product_attention` computes each sample by its causal kernel, or
    with `blocks` all by flex attention.

    Like `torch.nn.attention.bias.CausalBias`, it is a description: any other function gets the dense mask.
    """

    spans: list[list[int]]
    blocks: BlockMask | None
    _dense: Tensor | None

    @classmethod
    def of(cls, spans: list[list[int]], device: torch.device, blocks: BlockMask | None = None) -> SampleMask:
        """The mask of rows with samples of these lengths."""
        length = sum(spans[0])
        ones = torch.ones((), dtype=torch.bool, device=device).expand(len(spans), 1, length, length)
        mask = ones.as_subclass(cls)
        mask.spans, mask.blocks, mask._dense = spans, blocks, None
        return mask

    def dense(self) -> Tensor:
        """The same as a plain tensor."""
        if self._dense is None:
            positions = torch.arange(self.shape[-1], device=self.device)
            batch = torch.arange(len(self.spans), device=self.device)[:, None, None, None]
            visible = _visible(self.spans, self.device)
            self._dense = visible(batch, 0, positions[:, None], positions)
        return self._dense

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None = None, **kwargs: Any) -> Tensor:
        """Attention [B, heads, S, features] within each sample."""
        if self.blocks is not None:
            query, key, value = (_autocast(part) for part in (query, key, value))
            return _compiled(flex_attention)(query, key, value, block_mask=self.blocks, scale=scale)
        attend = partial(F.scaled_dot_product_attention, is_causal=True, scale=scale, **kwargs)
        rows = zip(*(part.split(1) for part in (query, key, value)), self.spans, strict=True)
        return torch.cat([_attend_row(attend, row, spans) for *row, spans in rows])

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace this mask in calls."""
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and isinstance(kwargs.get("attn_mask"), cls):
            options = {name: kwargs[name] for name in kwargs if name not in ("attn_mask", "is_causal")}
            return kwargs["attn_mask"].attend(*args, **options)
        with torch._C.DisableTorchFunctionSubclass():
            if func not in _OF_SHAPE:
                args, kwargs = tree_map_only(cls, cls.dense, (args, kwargs))
            return func(*args, **kwargs)


_PROPERTIES: tuple[Any, ...] = (Tensor.shape, Tensor.dtype, Tensor.device, Tensor.ndim, Tensor.requires_grad)
_OF_SHAPE = {Tensor.dim, Tensor.size, Tensor.is_floating_point, *(each.__get__ for each in _PROPERTIES)}
"""What reads shape, device and type only."""


def _attend_row(attend: Any, row: list[Tensor], spans: list[int]) -> Tensor:
    samples = zip(*(part.split(spans, dim=2) for part in row), strict=True)
    return torch.cat([attend(*sample) for sample in samples], dim=2)


_compiled = cache(torch.compile)


def _autocast(values: Tensor) -> Tensor:
    """As autocast does for SDPA; it leaves out flex attention before PyTorch 2.13."""
    device = values.device.type
    return values.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else values


def _block_mask(spans: list[list[int]], device: torch.device) -> BlockMask:
    rows, length = len(spans), sum(spans[0])
    return _compiled(create_block_mask)(_visible(spans, device), rows, None, length, length, device=device)


def _visible(spans: list[list[int]], device: torch.device) -> Callable[..., Tensor]:
    """Which keys a query sees, as a function of row, head, query and key."""
    samples = torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in spans])
    if device.type == "cuda":  # the host would wait for a copy from pageable memory
        samples = samples.pin_memory()
    samples = samples.to(device, non_blocking=True)  # (rows, length)

    def visible(row: Tensor, _: Any, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (samples[row, query] == samples[row, key])

    return visible


def _attends_to_entire_samples(decoder: PreTrainedModel) -> bool:
    """Whether every layer is attention to all that precedes in the sample, by Transformers' interface of attention."""
    config = decoder.config
    if not decoder._supports_attention_backend or decoder._is_stateful:
        return False
    if types := getattr(config, "layer_types", None):
        return set(types) == {"full_attention"}
    return getattr(config, "sliding_window", None) is None and getattr(config, "attention_chunk_size", None) is None
