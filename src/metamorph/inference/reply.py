"""Prompts to answers in text and visual tokens: the one place that calls `generate`."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from metamorph.inference.draw import ProgressCallback
from metamorph.models.modeling_metamorph import MetaMorphForConditionalGeneration
from metamorph.models.processing_metamorph import ImagePart, MetaMorphProcessor, TextPart


TEXT_BUDGET = 256
"""New tokens for text, besides those of one image."""


@dataclass(frozen=True)
class Prompt:
    """A user's turn: text with an `<image>` marker for each image."""

    text: str
    images: tuple[Image.Image, ...] = ()
    draw: bool = False
    """Whether the answer begins with an image, however the model would begin it."""


@dataclass(frozen=True)
class Reply:
    """What the model wrote and drew."""

    text: str
    """Its words, without control tokens and images."""
    visual_tokens: Tensor = field(repr=False)
    """`[images, N, D]` float32 on the CPU: its images in order; often none or one."""
    parts: tuple[TextPart | ImagePart, ...] = field(default=(), repr=False)
    """Texts and images in the order in which the model wrote them."""
    images: list[Image.Image] = field(default_factory=list)
    """The drawn images; empty if there are none, or no visualizer to draw them."""

    @property
    def num_images(self) -> int:
        """Number of images that the model emitted, drawn or not."""
        return self.visual_tokens.shape[0]


@torch.no_grad()
def reply_to(
    model: MetaMorphForConditionalGeneration,
    processor: MetaMorphProcessor,
    prompts: Sequence[Prompt],
    *,
    batch_size: int = 64,
    max_new_tokens: int | None = None,
    on_progress: ProgressCallback | None = None,
    **generate_kwargs: Any,
) -> list[Reply]:
    """Answer prompts in batches of similar length, greedily unless `generate_kwargs` ask for sampling.

    The replies are in the order of the prompts, their images not drawn. The mode of the model is restored. A prompt
    that asks for an image that the model cannot draw is a `ValueError`.

    Args:
        batch_size: Prompts per batch, padded on the left. It does not change the answers.
        max_new_tokens: By default room for one image and 256 tokens of text.
        **generate_kwargs: For `model.generate`, for example `do_sample=True, temperature=0.7`.
    """
    if any(prompt.draw for prompt in prompts) and not can_draw(model):
        raise ValueError("the model was trained without use_vision_ar, or without <image_start>: it cannot draw")
    budget = max_new_tokens if max_new_tokens is not None else processor.num_image_tokens + 2 + TEXT_BUDGET
    options = {"max_new_tokens": budget, "do_sample": False, **generate_kwargs}
    was_training = model.training
    model.eval()
    replies: dict[int, Reply] = {}
    try:
        for batch in _batches(prompts, batch_size):
            answers = _reply_to_batch(model, processor, [prompts[index] for index in batch], options)
            replies.update(zip(batch, answers, strict=True))
            if on_progress is not None:
                on_progress(len(batch))
    finally:
        model.train(was_training)
    return [replies[index] for index in range(len(prompts))]


def can_draw(model: MetaMorphForConditionalGeneration) -> bool:
    """Whether the model emits images as visual tokens."""
    return model.config.use_vision_ar and model.config.image_start_token_id is not None


def _batches(prompts: Sequence[Prompt], batch_size: int) -> Iterable[list[int]]:
    """Numbers of prompts that share a batch: little padding, and all or none of them begin with an image."""
    order = sorted(range(len(prompts)), key=lambda index: (len(prompts[index].images), len(prompts[index].text)))
    for draw in (False, True):
        same = [index for index in order if prompts[index].draw == draw]
        for start in range(0, len(same), batch_size):
            yield same[start : start + batch_size]


def _reply_to_batch(
    model: MetaMorphForConditionalGeneration,
    processor: MetaMorphProcessor,
    prompts: Sequence[Prompt],
    options: dict[str, Any],
) -> list[Reply]:
    encoded: Any = processor.apply_chat_template(
        [[{"role": "user", "content": prompt.text}] for prompt in prompts],
        images=[image for prompt in prompts for image in prompt.images],
        add_generation_prompt=True,
        tokenize=True,
    )
    inputs = dict(encoded.to(model.device))
    prompt_length = inputs["input_ids"].shape[1]
    if prompts[0].draw:
        # The prompt ends where an image begins, so the first token generated is a visual one.
        for name, value in (("input_ids", model.config.image_start_token_id), ("attention_mask", 1)):
            inputs[name] = torch.nn.functional.pad(inputs[name], (0, 1), value=value)
    output: Any = model.generate(
        **inputs,
        eos_token_id=processor.end_of_turn_token_ids,
        pad_token_id=processor.pad_token_id,
        **options,
    )
    visual_tokens = output.visual_tokens.float().cpu()
    rows = processor.decode_interleaved(output.sequences, visual_tokens, prompt_length=prompt_length)
    per_row = visual_tokens.split(output.num_images.tolist())
    return [
        Reply("".join(part.text for part in row if isinstance(part, TextPart)).strip(), tokens, tuple(row))
        for row, tokens in zip(rows, per_row, strict=True)
    ]
