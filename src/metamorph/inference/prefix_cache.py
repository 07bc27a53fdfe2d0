"""Key/value caches: of a conversation, kept from one answer to the next, and of a fixed size for compiled steps."""

from __future__ import annotations

from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, StaticCache

from metamorph.models.modeling_metamorph import MetaMorphForConditionalGeneration


_STATIC_STEP = 512  # static caches have multiples of this length: another length compiles again


def is_compiled(model: MetaMorphForConditionalGeneration) -> bool:
    """Whether `generate` compiles a step of the model once its cache has a fixed size (`torch_compile` of `load`)."""
    return model.generation_config.compile_config is not None


def empty_cache(model: MetaMorphForConditionalGeneration, length: int) -> Cache:
    """A cache for `length` tokens, of a fixed size if steps are compiled."""
    config = model.config.get_text_config()
    if not is_compiled(model):
        return DynamicCache(config=config)
    return StaticCache(config=config, max_cache_len=-(-length // _STATIC_STEP) * _STATIC_STEP)


class PrefixCache:
    """The key/value cache of one conversation: what a prompt shares with the last sequence is not computed again."""

    def __init__(self, model: MetaMorphForConditionalGeneration) -> None:
        self.model, self.config = model, model.config
        self._cache: Cache | None = None
        self._ids: list[int] = []
        self._visual_tokens = self._no_images()

    def take(self, input_ids: Tensor, visual_tokens: Tensor | None, max_length: int) -> Cache:
        """The cache of the longest beginning that `input_ids` [1, length] and `visual_tokens` [images, N, D] share with
        the last sequence, for `max_length` tokens in all. It is empty after an answer that failed, or if the model's
        cache cannot be cut or is too small.
        """
        cache, known, known_images = self._cache, self._ids, self._visual_tokens
        ids = input_ids[0].tolist()
        images = self._no_images() if visual_tokens is None else visual_tokens.float().cpu()
        self._cache, self._ids, self._visual_tokens = None, ids, images
        if cache is not None and not (isinstance(cache, StaticCache) and cache.get_max_length() < max_length):
            length = int(cache.get_seq_length())
            shared = self._shared(ids, images, known[:length], known_images)
            if shared == length or _cut(cache, shared, length):
                return cache
        return empty_cache(self.model, max_length)

    def keep(self, output: Any) -> None:
        """Keep the cache of what `generate` returned."""
        self._cache = output.past_key_values
        self._ids = output.sequences[0].tolist()
        self._visual_tokens = torch.cat([self._visual_tokens, output.visual_tokens.float().cpu()])

    def _shared(self, ids: list[int], images: Tensor, known: list[int], known_images: Tensor) -> int:
        """Length of the common beginning, without a part of an image; one token at least is left to compute."""
        equal = (left == right for left, right in zip(ids[:-1], known, strict=False))
        shared = sum(1 for _ in takewhile(bool, equal))
        placeholders = [index for index, token in enumerate(ids) if token == self.config.image_token_id]
        size = self.config.num_image_tokens
        for number in range(len(images)):
            first, last = placeholders[number * size], placeholders[(number + 1) * size - 1]
            is_known = number < len(known_images) and torch.equal(images[number], known_images[number])
            if first < shared and not (is_known and last < shared):
                return first
        return shared

    def _no_images(self) -> Tensor:
        return torch.empty(0, self.config.num_image_tokens, self.config.vision_feature_size)


def _cut(cache: Cache, shared: int, length: int) -> bool:
    """Cut a cache from `length` to `shared` tokens, if that is possible."""
    if any(cache.is_sliding):
        return False
    if isinstance(cache, StaticCache):  # nothing attends to what comes after its length
        for layer in cache.layers:
            layer.cumulative_length.fill_(shared)
        return True
    if not getattr(cache, "is_croppable", True):  # not in every release of Transformers
        return False
    cache.crop(shared - length)
    return True
