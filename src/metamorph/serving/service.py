"""What the dialects of the API share: checks of a request, its prompts, its answers, and how images are sent."""

from __future__ import annotations

import asyncio
import base64
import io
import re
import secrets
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, model_validator

from metamorph.inference.draw import SamplerSettings
from metamorph.inference.prompt import Prompt
from metamorph.inference.reply import Reply, default_budget
from metamorph.inference.sampling import MAX_SEED, Sampling
from metamorph.models.sequence.conversations import ImagePart, TextPart
from metamorph.serving.engine import Answers, Engine
from metamorph.serving.errors import ApiError
from metamorph.serving.limits import Limits
from metamorph.serving.metrics import Metrics
from metamorph.serving.request_images import RequestImages


MAX_CHOICES = 10
"""Answers to one request."""
_SURROGATE = re.compile("[\ud800-\udfff]")
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]


class Drawing(BaseModel):
    """Fields of all dialects that say how images are drawn, named as in diffusers. A null is the default."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    model: str | None = None
    """The served model, which is the default."""
    seed: Seed | None = None
    """The first answer has this seed, the second the next one; by default another one each time."""
    guidance_scale: float = Field(3.0, ge=0, le=100, allow_inf_nan=False)
    """Strength of classifier-free guidance; 1 is none."""
    num_inference_steps: int = Field(20, ge=1, le=250)
    """Steps of the sampler."""

    def settings(self, seed: int) -> SamplerSettings:
        """How the images of an answer with this seed are drawn."""
        return SamplerSettings(self.guidance_scale, self.num_inference_steps, seed)

    @model_validator(mode="before")
    @classmethod
    def _leave_out_nulls(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if value is not None}


class Answering(Drawing):
    """Fields of both conversational dialects that say how text is sampled."""

    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    """0, the default, takes the most likely token; if only `top_p` is given, the default is 1."""
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)

    def sampling(self, seed: int) -> Sampling:
        """How an answer with this seed is sampled."""
        default = 0.0 if self.top_p is None else 1.0
        temperature = default if self.temperature is None else self.temperature
        return Sampling(temperature, 1.0 if self.top_p is None else self.top_p, seed=seed)


@dataclass
class Service:
    """A server's engine, with its limits."""

    engine: Engine
    model_name: str
    limits: Limits = field(default_factory=Limits)
    image_hosts: Collection[str] = ()
    metrics: Metrics = field(default_factory=Metrics)
    started: int = field(default_factory=lambda: int(time.time()))

    def images(self) -> RequestImages:
        """Opens the images of a request."""
        return RequestImages(self.limits, self.image_hosts)

    def check_model(self, name: str | None) -> None:
        """Refuse another model than the one that is served."""
        if name not in (None, "", self.model_name):
            message = f"there is no model {name!r} here, only {self.model_name!r}"
            raise ApiError(message, status=404, param="model", code="model_not_found")

    def check_drawing(self, param: str) -> None:
        """Refuse to draw without a visualizer."""
        if not self.engine.can_draw:
            message = "this server does not draw images: it has no visualizer, or its model writes only text"
            raise ApiError(message, param=param, code="no_images")

    @property
    def tokens_of_image(self) -> int:
        """Visual tokens of an image."""
        return self.engine.session.processor.num_image_tokens

    async def submit(
        self, prompt: Prompt, options: Drawing, n: int = 1, max_tokens: int | None = None, param: str = "max_tokens"
    ) -> Answers:
        """Queue `n` answers to a prompt, once it is known to be valid and to fit into the context.

        `max_tokens` limits each answer; `param` is its name in the dialect.
        """
        if n > self.engine.max_queue:
            message = f"n is {n}, but only {self.engine.max_queue} answers may wait here at a time"
            raise ApiError(message, param="n", code="invalid_value")
        try:
            length = await asyncio.to_thread(self.engine.num_prompt_tokens, prompt)
        except ValueError as error:
            raise ApiError(f"the conversation is not valid: {error}", code="invalid_prompt") from error
        context = min(self.limits.max_tokens or self.engine.max_tokens, self.engine.max_tokens)
        least = self.tokens_of_image + 1 if prompt.draw else 1
        budget = default_budget(self.engine.session.processor) if max_tokens is None else max_tokens
        if budget < least:
            message = f"an image takes {least} tokens, more than {param} {budget}"
            raise ApiError(message, param=param, code="invalid_value")
        if length + (least if max_tokens is None else max_tokens) > context:
            message = f"the prompt has {length} tokens, which leaves {max(0, context - length)} of {context}"
            message += "" if max_tokens is None else f" for the answer, but {param} is {max_tokens}"
            raise ApiError(message, code="context_length_exceeded")
        limit = least if prompt.draw else min(budget, context - length)  # what begins with an image is one image
        prompt = replace(prompt, max_new_tokens=limit)
        first = secrets.randbelow(2**32) if options.seed is None else options.seed
        rows = []
        for seed in range(first, first + n):
            sampling = options.sampling(seed) if isinstance(options, Answering) else None
            rows.append((replace(prompt, sampling=sampling), options.settings(seed)))
        return self.engine.submit(rows)

    def account(self, replies: Sequence[Reply], prompt_images: int) -> Usage:
        """What the answers to one prompt took, which the metrics count, too."""
        size = self.tokens_of_image
        usage = Usage(
            replies[0].num_prompt_tokens,
            prompt_images * size,
            sum(reply.num_tokens for reply in replies),
            sum(reply.num_images for reply in replies) * size,
        )
        self.metrics.count(usage, sum(len(reply.images) for reply in replies))
        return usage


@dataclass(frozen=True)
class Usage:
    """Tokens of a request. Visual tokens are among those of the prompt and of the answers."""

    prompt: int
    prompt_visual: int
    answer: int
    answer_visual: int

    def chat(self) -> dict[str, Any]:
        """In the words of chat completions."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.answer,
            "total_tokens": self.prompt + self.answer,
            "prompt_tokens_details": {"cached_tokens": 0, "image_tokens": self.prompt_visual},
            "completion_tokens_details": {"reasoning_tokens": 0, "image_tokens": self.answer_visual},
        }

    def responses(self) -> dict[str, Any]:
        """In the words of responses and images."""
        return {
            "input_tokens": self.prompt,
            "input_tokens_details": {
                "cached_tokens": 0,
                "text_tokens": self.prompt - self.prompt_visual,
                "image_tokens": self.prompt_visual,
            },
            "output_tokens": self.answer,
            "output_tokens_details": {
                "reasoning_tokens": 0,
                "text_tokens": self.answer - self.answer_visual,
                "image_tokens": self.answer_visual,
            },
            "total_tokens": self.prompt + self.answer,
        }


def turn(role: str, parts: Sequence[str | Image.Image]) -> dict[str, Any]:
    """A message of texts and images in order. In the user's, an image is on a line of its own, as in training data.

    A literal `<image>` in the text is text. Half of a surrogate pair, which JSON admits, is an [`ApiError`].
    """
    content: list[Any] = []
    for number, part in enumerate(parts):
        if isinstance(part, str) and not part.isascii() and _SURROGATE.search(part):
            raise ApiError("a text has half of a surrogate pair, which is not a character", code="invalid_text")
        if number and role == "user" and not (isinstance(part, str) and isinstance(parts[number - 1], str)):
            content.append(TextPart("\n"))
        content.append(TextPart(part) if isinstance(part, str) else {"type": "image", "image": part})
    return {"role": role, "content": content}


async def base64_of(part: ImagePart, file_format: str = "png") -> str:
    """The drawn image of a part, as the base64 text of a file."""

    def encode() -> str:
        file = io.BytesIO()
        part.images[0].save(file, file_format)
        return base64.b64encode(file.getvalue()).decode()

    return await asyncio.to_thread(encode)


async def data_url(part: ImagePart) -> str:
    """The drawn image of a part, as the `data:` URL of a PNG file."""
    return f"data:image/png;base64,{await base64_of(part)}"
