"""Batched replies of a model to prompts with pictures: the one place where evaluation calls `generate`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from metamorph.models.modeling_metamorph import MetaMorphForConditionalGeneration
from metamorph.models.processing_metamorph import MetaMorphProcessor, TextPart


Progress = Callable[[int], object]
"""Called with the number of items that have just been finished."""

TEXT_BUDGET = 24
"""New tokens left for words, beside those of one picture."""


@dataclass(frozen=True)
class Prompt:
    """What a user asks: words with an `<image>` marker for each picture."""

    text: str
    """The user's turn."""
    images: tuple[Image.Image, ...] = ()
    """One picture for each marker."""


@dataclass(frozen=True)
class Reply:
    """What the model wrote and drew."""

    text: str
    """Its words, without control tokens and pictures."""
    visual_tokens: Tensor = field(repr=False)
    """[pictures, N, D] its pictures in order; often none or one."""

    @property
    def num_pictures(self) -> int:
        """How many pictures it drew, that is how often it emitted `<image_start>`."""
        return self.visual_tokens.shape[0]


@torch.no_grad()
def reply_to(
    model: MetaMorphForConditionalGeneration,
    processor: MetaMorphProcessor,
    prompts: Sequence[Prompt],
    *,
    batch_size: int = 64,
    max_new_tokens: int | None = None,
    on_progress: Progress | None = None,
) -> list[Reply]:
    """Decode greedily, prompts of similar length together.

    Args:
        model: In evaluation mode on return.
        processor: The model's own.
        prompts: One turn each.
        batch_size: Prompts per batch, padded on the left.
        max_new_tokens: By default one picture and `TEXT_BUDGET` tokens, so that every reply may hold a picture:
            whether the model draws when it should not is part of what is measured.
        on_progress: Called after each batch.

    Returns:
        Replies in the order of the prompts.
    """
    model.eval()
    budget = max_new_tokens if max_new_tokens is not None else processor.num_image_tokens + 2 + TEXT_BUDGET
    order = sorted(range(len(prompts)), key=lambda index: (len(prompts[index].images), len(prompts[index].text)))
    replies: dict[int, Reply] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        answers = _reply_to_batch(model, processor, [prompts[index] for index in chosen], budget)
        replies.update(zip(chosen, answers, strict=True))
        if on_progress is not None:
            on_progress(len(chosen))
    return [replies[index] for index in range(len(prompts))]


def _reply_to_batch(
    model: MetaMorphForConditionalGeneration, processor: MetaMorphProcessor, prompts: Sequence[Prompt], budget: int
) -> list[Reply]:
    encoded: Any = processor.apply_chat_template(
        [[{"role": "user", "content": prompt.text}] for prompt in prompts],
        images=[image for prompt in prompts for image in prompt.images],
        add_generation_prompt=True,
        tokenize=True,
    )
    inputs = encoded.to(model.device)
    output: Any = model.generate(
        **inputs,
        max_new_tokens=budget,
        do_sample=False,
        eos_token_id=processor.end_of_turn_token_ids,
        pad_token_id=processor.pad_token_id,
    )
    images = output.visual_tokens.float().cpu()
    rows = processor.decode_interleaved(output.sequences, images, prompt_length=inputs["input_ids"].shape[1])
    per_row = images.split(output.num_images.tolist())
    return [
        Reply("".join(part.text for part in row if isinstance(part, TextPart)).strip(), tokens)
        for row, tokens in zip(rows, per_row, strict=True)
    ]
