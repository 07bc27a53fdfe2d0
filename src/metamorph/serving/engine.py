"""The model and visualizer of a server: answers of many clients, batched, streamed, cancelled one by one."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from metamorph.inference.draw import SamplerSettings, draw
from metamorph.inference.prompt import Prompt
from metamorph.inference.reply import Reply, reply_to
from metamorph.inference.session import Session
from metamorph.inference.streaming import Part
from metamorph.models.processing_metamorph import ImagePart
from metamorph.serving.batcher import Batcher


@dataclass(eq=False)
class Request:
    """A prompt on its way through the engine."""

    prompt: Prompt
    settings: SamplerSettings
    loop: asyncio.AbstractEventLoop
    pieces: asyncio.Queue[Part | tuple[ImagePart, Future] | None] = field(default_factory=asyncio.Queue)
    """What the model wrote: text, images and the futures of their drawings, and None at the end."""
    cancelled: threading.Event = field(default_factory=threading.Event)
    num_images: int = 0

    def put(self, piece: Part | tuple[ImagePart, Future] | None) -> None:
        """Pass a piece to the client's task, from any thread."""
        self.loop.call_soon_threadsafe(self.pieces.put_nowait, piece)


class Engine:
    """Answers requests in batches on one thread, and draws their images on another.

    What shares a batch with a request does not change its answer: each has its own random numbers and limits.
    """

    def __init__(
        self, session: Session, *, max_batch_size: int = 8, max_wait_ms: float = 5.0, max_queue: int = 64
    ) -> None:
        self.session = session
        self._answers: Batcher[Request, Reply] = Batcher(
            "answers",
            self._answer,
            lambda request: request.prompt.draw,
            max_size=max_batch_size,
            max_wait=max_wait_ms / 1000,
            max_waiting=max_queue,
        )
        self._drawings: Batcher[tuple[Tensor, SamplerSettings], tuple[Image.Image, ...]] = Batcher(
            "drawings", self._draw, lambda item: replace(item[1], seed=0), max_size=max_batch_size
        )

    @property
    def num_waiting(self) -> int:
        """Number of requests in the queue."""
        return self._answers.num_waiting

    def num_prompt_tokens(self, prompt: Prompt) -> int:
        """Length of a prompt; a `ValueError` if it is not valid."""
        encoded: Any = self.session.processor.apply_chat_template(
            prompt.messages, images=list(prompt.images), add_generation_prompt=True, tokenize=True
        )
        return encoded["input_ids"].shape[1] + prompt.draw

    async def answer(
        self, prompt: Prompt, settings: SamplerSettings | None = None
    ) -> AsyncGenerator[Part | Reply, None]:
        """Yield the pieces of an answer in order, images once they are drawn, and last the reply.

        Closing the generator ends the answer. Raises `QueueFull`, or `Closed` while the server ends.
        """
        request = Request(prompt, settings or SamplerSettings(), asyncio.get_running_loop())
        future = self._answers.submit(request)
        future.add_done_callback(lambda _: request.put(None))
        drawn: list[ImagePart] = []
        try:
            while (piece := await request.pieces.get()) is not None:
                if isinstance(piece, tuple):
                    part, drawing = piece
                    piece = replace(part, images=await asyncio.wrap_future(drawing))
                    drawn.append(piece)
                yield piece
            reply = await asyncio.wrap_future(future)
            images = iter(drawn)
            yield replace(
                reply,
                parts=tuple(next(images, part) if isinstance(part, ImagePart) else part for part in reply.parts),
            )
        finally:
            request.cancelled.set()
            future.cancel()

    def close(self) -> None:
        """Finish the requests that came, and refuse others."""
        self._answers.close()
        self._drawings.close()

    def _answer(self, requests: list[Request]) -> list[Reply]:
        return reply_to(
            self.session.model,
            self.session.processor,
            [request.prompt for request in requests],
            batch_size=len(requests),
            on_part=lambda index, part: self._take_part(requests[index], part),
            cancelled=[request.cancelled for request in requests],
        )

    def _take_part(self, request: Request, part: Part) -> None:
        if isinstance(part, ImagePart) and self.session.pipeline is not None:
            settings = replace(request.settings, seed=request.settings.seed + request.num_images)
            request.num_images += 1
            request.put((part, self._drawings.submit((part.visual_tokens, settings))))
        else:
            request.put(part)

    def _draw(self, items: list[tuple[Tensor, SamplerSettings]]) -> list[tuple[Image.Image, ...]]:
        tokens = torch.stack([tokens for tokens, _ in items])
        seeds = [settings.seed for _, settings in items]
        images = draw(self.session.visualizer, tokens, items[0][1], seeds=seeds)
        scales = len(images) // len(items)
        return [tuple(images[start : start + scales]) for start in range(0, len(images), scales)]
