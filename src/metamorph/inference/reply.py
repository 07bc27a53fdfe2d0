"""Prompts to answers in text and visual tokens: the one place that calls `generate`."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from metamorph.inference.draw import ProgressCallback
from metamorph.inference.prefix_cache import PrefixCache, empty_cache, is_compiled
from metamorph.inference.prompt import Prompt
from metamorph.inference.sampling import RowSampler, Sampling
from metamorph.inference.streaming import AnswerCriteria, AnswerDecoder, FinishReason, Part
from metamorph.models.generation import GeneratedVisualTokens
from metamorph.models.modeling_metamorph import MetaMorphForConditionalGeneration
from metamorph.models.processing_metamorph import ImagePart, MetaMorphProcessor, TextPart


TEXT_BUDGET = 256
"""New tokens for text, besides those of one image."""


@dataclass(frozen=True)
class Reply:
    """What the model wrote and drew."""

    text: str
    """Its words, without control tokens and images."""
    visual_tokens: Tensor = field(repr=False)
    """`[images, N, D]` float32 on the CPU: its images in order; often none or one."""
    parts: tuple[Part, ...] = field(default=(), repr=False)
    """Texts and images in the order in which the model wrote them."""
    finish_reason: FinishReason = "stop"
    """`stop`: the model or a stop string ended the answer; `length`: a limit did; `cancelled`."""
    num_prompt_tokens: int = 0
    """Tokens of the conversation, visual ones included."""
    num_tokens: int = 0
    """Tokens of the answer, visual ones included."""

    @property
    def num_images(self) -> int:
        """Number of images that the model emitted, drawn or not."""
        return self.visual_tokens.shape[0]

    @property
    def images(self) -> list[Image.Image]:
        """The drawn images; empty if there are none, or no visualizer to draw them."""
        return [image for part in self.parts if isinstance(part, ImagePart) for image in part.images]


@torch.no_grad()
def reply_to(
    model: MetaMorphForConditionalGeneration,
    processor: MetaMorphProcessor,
    prompts: Sequence[Prompt],
    *,
    batch_size: int = 64,
    max_new_tokens: int | None = None,
    on_progress: ProgressCallback | None = None,
    on_part: Callable[[int, Part], Part | None] | None = None,
    cancelled: Sequence[threading.Event] | None = None,
    cache: PrefixCache | None = None,
    **generate_kwargs: Any,
) -> list[Reply]:
    """Answer prompts in batches of similar length, greedily unless prompts or `generate_kwargs` ask for sampling.

    The replies are in the order of the prompts, their images not drawn. The mode of the model is restored. A prompt
    that asks for an image that the model cannot draw, or that fills the model's context, is a `ValueError`.

    Args:
        batch_size: Prompts per batch, padded on the left. It does not change the answers.
        max_new_tokens: By default room for one image and 256 tokens of text, as far as the context has it.
        on_part: Called while the answers are generated with the number of the prompt and each piece of text or
            finished image; the part that it returns, if any, takes its place in the reply.
        cancelled: An event for each prompt that ends its answer once it is set.
        cache: Keeps keys and values for the next prompt of the conversation; for one prompt, whose images are visual
            tokens.
        **generate_kwargs: For `model.generate`, for example `do_sample=True, temperature=0.7`.
    """
    if any(prompt.draw for prompt in prompts) and not can_draw(model):
        raise ValueError("the model was trained without use_vision_ar, or without <image_start>: it cannot draw")
    budget = max_new_tokens if max_new_tokens is not None else default_budget(processor)
    decoders = [
        AnswerDecoder(
            processor,
            limit=budget if prompt.max_new_tokens is None else prompt.max_new_tokens,
            stop=prompt.stop,
            cancelled=threading.Event() if cancelled is None else cancelled[index],
            on_part=partial(on_part, index) if on_part is not None else None,
        )
        for index, prompt in enumerate(prompts)
    ]
    if len(prompts) > batch_size:  # before any is answered; batches check their own
        for number, prompt in enumerate(prompts, start=1):
            check_fits(model, processor, prompt, prompt_length(processor, prompt), f"prompt {number}")
    options = {"do_sample": False, **generate_kwargs}
    was_training = model.training
    model.eval()
    replies: dict[int, Reply] = {}
    try:
        for batch in _batches(prompts, batch_size):
            rows = [prompts[index] for index in batch], [decoders[index] for index in batch]
            replies.update(zip(batch, _reply_to_batch(model, processor, *rows, cache, options), strict=True))
            if on_progress is not None:
                on_progress(len(batch))
    finally:
        model.train(was_training)
    return [replies[index] for index in range(len(prompts))]


def can_draw(model: MetaMorphForConditionalGeneration) -> bool:
    """Whether the model emits images as visual tokens."""
    return "image" in model.output_modalities


def prompt_length(processor: MetaMorphProcessor, prompt: Prompt) -> int:
    """Tokens of a prompt, with the `<image_start>` of `draw`; a `ValueError` if it is invalid. Encodes no images."""
    encoded = processor.encode_conversation(
        prompt.messages, list(prompt.images), add_generation_prompt=True, with_pixels=False
    )
    return len(encoded.input_ids) + prompt.draw


def check_fits(
    model: MetaMorphForConditionalGeneration,
    processor: MetaMorphProcessor,
    prompt: Prompt,
    length: int,
    name: str = "the prompt",
) -> None:
    """Raise a `ValueError` with both numbers if a prompt leaves no room for an answer, or for the image of `draw`."""
    context, needed = model.context_length, processor.num_image_tokens + 1 if prompt.draw else 1
    if context is not None and length + needed > context:
        room = f"{max(context - length, 0)} of {context} for the answer"
        image = f", and its image takes {needed}" if prompt.draw else ""
        raise ValueError(f"{name} has {length} tokens, which leaves {room}{image}: shorten it")


def default_budget(processor: MetaMorphProcessor) -> int:
    """New tokens by default: one image and some text."""
    return processor.num_image_tokens + 2 + TEXT_BUDGET


def _batches(prompts: Sequence[Prompt], batch_size: int) -> Iterable[list[int]]:
    """Numbers of prompts that share a batch: little padding, and all or none of them begin with an image."""

    def size(index: int) -> tuple[int, int]:
        texts = (message.get("content") or "" for message in prompts[index].messages)
        return len(prompts[index].images), sum(map(len, texts))

    order = sorted(range(len(prompts)), key=size)
    for draw in (False, True):
        same = [index for index in order if prompts[index].draw == draw]
        for start in range(0, len(same), batch_size):
            yield same[start : start + batch_size]


def _reply_to_batch(
    model: MetaMorphForConditionalGeneration,
    processor: MetaMorphProcessor,
    prompts: Sequence[Prompt],
    decoders: Sequence[AnswerDecoder],
    cache: PrefixCache | None,
    options: dict[str, Any],
) -> list[Reply]:
    encoded: Any = processor.apply_chat_template(
        [prompt.messages for prompt in prompts],
        images=[image for prompt in prompts for image in prompt.images],
        add_generation_prompt=True,
        tokenize=True,
    )
    inputs = dict(encoded.to(model.device))
    lengths = (inputs["attention_mask"].sum(dim=1) + prompts[0].draw).tolist()  # with the <image_start> that is added
    for prompt, decoder, length in zip(prompts, decoders, lengths, strict=True):
        check_fits(model, processor, prompt, length)
        decoder.limit = min(decoder.limit, (model.context_length or sys.maxsize) - length)
    state = GeneratedVisualTokens(
        torch.tensor([prompt.allow_images for prompt in prompts], device=model.device),
        torch.tensor([decoder.limit for decoder in decoders], device=model.device),
    )
    if any(prompt.sampling is not None for prompt in prompts):
        rows = [prompt.sampling or Sampling() for prompt in prompts]
        given = options.get("logits_processor") or ()
        options = {**options, "logits_processor": [*given, RowSampler(rows, model.device)]}
    options = dict(options)
    criteria = options.pop("stopping_criteria", None) or ()
    limit = max(decoder.limit for decoder in decoders)
    length = max(lengths) + limit
    if cache is not None:
        options = {**options, "past_key_values": cache.take(inputs["input_ids"], inputs.get("visual_tokens"), length)}
    elif is_compiled(model):
        options = {**options, "past_key_values": empty_cache(model, length)}
    output: Any = model.generate(
        **inputs,
        eos_token_id=processor.end_of_turn_token_ids,
        pad_token_id=processor.pad_token_id,
        max_new_tokens=limit,
        generation_mode="image" if prompts[0].draw else None,
        return_dict_in_generate=True,
        generated_state=state,
        stopping_criteria=[*criteria, AnswerCriteria(decoders, state)],
        **options,
    )
    if cache is not None:
        cache.keep(output)
    return [_reply(model, decoder, length) for decoder, length in zip(decoders, lengths, strict=True)]


def _reply(model: MetaMorphForConditionalGeneration, decoder: AnswerDecoder, prompt_length: int) -> Reply:
    if decoder.finish_reason is None:  # a stopping criterion of the caller, such as a time limit
        decoder.finish("length")
    images = [part.visual_tokens for part in decoder.parts if isinstance(part, ImagePart)]
    empty = torch.empty(0, decoder.processor.num_image_tokens, model.config.vision_feature_size)
    return Reply(
        "".join(part.text for part in decoder.parts if isinstance(part, TextPart)).strip(),
        torch.stack(images) if images else empty,
        tuple(decoder.parts),
        decoder.finish_reason or "length",
        prompt_length,
        decoder.num_tokens,
    )
