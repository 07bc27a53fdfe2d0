"""Keys and values of a conversation, kept from one answer to the next."""

from __future__ import annotations

from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from metamorph.models.modeling_metamorph import MetaMorphForConditionalGeneration


class PrefixCache:
    """The key/value cache of one conversation: what a prompt shares with the last sequence is not computed again."""

    def __init__(self, model: MetaMorphForConditionalGeneration) -> None:
        self.config = model.config
        self._cache: Cache | None = None
        self._ids: list[int] = []
        self._visual_tokens = self._no_images()

    def take(self, input_ids: Tensor, visual_tokens: Tensor | None) -> Cache:
        """The cache of the longest beginning that `input_ids` [1, length] and `visual_tokens` [images, N, D] share with
        the last sequence. It is empty after an answer that failed, or if the model's cache cannot be cut.
        """
        cache, known, known_images = self._cache, self._ids, self._visual_tokens
        ids = input_ids[0].tolist()
        images = self._no_images() if visual_tokens is None else visual_tokens.float().cpu()
        self._cache, self._ids, self._visual_tokens = None, ids, images
        if cache is not None:
            length = cache.get_seq_length()
            shared = self._shared(ids, images, known[:length], known_images)
            if shared == length:
                return cache
            if getattr(cache, "is_croppable", not any(cache.is_sliding)):
                cache.crop(shared - length)
                return cache
        return DynamicCache(config=self.config.get_text_config())

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
