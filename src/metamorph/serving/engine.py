"""The model and visualizer of a server: answers of many clients, batched, streamed, cancelled one by one."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

import torch
from PIL import Image
from torch import Tensor

from metamorph.inference.draw import SamplerSettings, draw_each
from metamorph.inference.prompt import Prompt
from metamorph.inference.reply import Reply, can_draw, prompt_length, reply_to
from metamorph.inference.session import Session
from metamorph.inference.streaming import Part
from metamorph.models.processing_metamorph import ImagePart
from metamorph.serving.batcher import Batcher


@dataclass(eq=False)
class Row:
    """A prompt, which becomes one row of a batch, and where its answer goes."""

    prompt: Prompt
    settings: SamplerSettings
    loop: asyncio.AbstractEventLoop
    pieces: asyncio.Queue[Part | tuple[ImagePart, Future] | None] = field(default_factory=asyncio.Queue)
    """What the model wrote: text, images and the futures of their drawings, and None at the end."""
    cancelled: threading.Event = field(default_factory=threading.Event)
    drawings: list[Future] = field(default_factory=list)

    def put(self, piece: Part | tuple[ImagePart, Future] | None) -> None:
        """Pass a piece to the client's task, from any thread."""
        self.loop.call_soon_threadsafe(self.pieces.put_nowait, piece)

    def end(self, _: object) -> None:
        """Called when the answer is complete, or has failed."""
        self.put(None)

    def cancel(self) -> None:
        """End the answer, and forget drawings that have not begun."""
        self.cancelled.set()
        for drawing in self.drawings:
            drawing.cancel()


class Answers:
    """Answers to the prompts of one client while they are generated."""

    def __init__(self, rows: Sequence[Row], futures: Sequence[Future[Reply]]) -> None:
        self._rows = list(zip(rows, futures, strict=True))
        for row, future in self._rows:
            future.add_done_callback(row.end)

    async def __aiter__(self) -> AsyncGenerator[tuple[int, Part | Reply], None]:
        """Yield the number of a prompt and a piece of its answer, images once they are drawn, and last its reply."""
        merged: asyncio.Queue[tuple[int, Part | Reply] | None] = asyncio.Queue()

        async def pump(index: int, row: Row, future: Future[Reply]) -> None:
            async for piece in self._pieces(row, future):
                merged.put_nowait((index, piece))

        pumps = asyncio.gather(*(pump(index, *row) for index, row in enumerate(self._rows)))

        def end(_: object) -> None:
            if not pumps.cancelled():
                pumps.exception()  # retrieved, or asyncio would log that a client left
            merged.put_nowait(None)

        pumps.add_done_callback(end)
        try:
            while (item := await merged.get()) is not None:
                yield item
            await pumps
        finally:
            pumps.cancel()
            self.cancel()

    async def replies(self) -> list[Reply]:
        """The replies, in the order of the prompts."""
        found = {index: piece async for index, piece in self if isinstance(piece, Reply)}
        return [found[index] for index in range(len(self._rows))]

    def cancel(self) -> None:
        """End the answers."""
        for row, future in self._rows:
            row.cancel()
            future.cancel()

    @staticmethod
    async def _pieces(row: Row, future: Future[Reply]) -> AsyncGenerator[Part | Reply, None]:
        drawn: list[ImagePart] = []
        while (piece := await row.pieces.get()) is not None:
            if isinstance(piece, tuple):
                part, drawing = piece
                piece = replace(part, images=await asyncio.wrap_future(drawing))
                drawn.append(piece)
            yield piece
        reply = await asyncio.wrap_future(future)
        images = iter(drawn)
        yield replace(
            reply, parts=tuple(next(images, part) if isinstance(part, ImagePart) else part for part in reply.parts)
        )


class Engine:
    """Answers requests in batches on one thread, and draws their images on another.

    What shares a batch with a request does not change its answer: each has its own random numbers and limits.
    """

    def __init__(
        self, session: Session, *, max_batch_size: int = 8, max_wait_ms: float = 25.0, max_queue: int = 64
    ) -> None:
        self.session = session
        self.max_queue = max_queue
        self.max_requests = max_queue + max_batch_size
        self.is_refusing = False
        self.num_running = 0
        self._answers: Batcher[Row, Reply] = Batcher(
            "answers",
            self._answer,
            lambda row: row.prompt.draw,
            max_size=max_batch_size,
            max_wait=max_wait_ms / 1000,
            max_waiting=max_queue,
        )
        self._drawings: Batcher[tuple[Tensor, SamplerSettings], tuple[Image.Image, ...]] = Batcher(
            "drawings", self._draw, lambda item: replace(item[1], seed=0), max_size=max_batch_size
        )

    @property
    def num_waiting(self) -> int:
        """Number of answers in the queue."""
        return self._answers.num_waiting

    @property
    def can_draw(self) -> bool:
        """Whether answers may have images: the model writes them, and there is a visualizer."""
        return self.session.pipeline is not None and can_draw(self.session.model)

    @property
    def max_tokens(self) -> int:
        """The model's context: tokens of a prompt and its answer together."""
        return self.session.model.context_length or sys.maxsize

    @property
    def image_size(self) -> tuple[int, int]:
        """Width and height of drawn images; a `ValueError` without a visualizer."""
        from metamorph.visualization.pipeline import vae_scale_factor

        pipeline = self.session.visualizer
        size, factor = pipeline.unet.config.sample_size, vae_scale_factor(pipeline.vae.config)
        height, width = (size, size) if isinstance(size, int) else size
        return width * factor, height * factor

    def num_prompt_tokens(self, prompt: Prompt) -> int:
        """Length of a prompt; a `ValueError` if it is not valid. Images are not encoded."""
        return prompt_length(self.session.processor, prompt)

    def submit(self, prompts: Sequence[tuple[Prompt, SamplerSettings]]) -> Answers:
        """Queue prompts, all or none: raises `QueueFull`, or `Closed` while the server ends. Needs an event loop."""
        loop = asyncio.get_running_loop()
        rows = [Row(prompt, settings, loop) for prompt, settings in prompts]
        return Answers(rows, self._answers.submit_all(rows))

    def refuse(self) -> None:
        """Refuse new requests and those that wait; what runs is finished."""
        self.is_refusing = True
        self._answers.refuse()

    def close(self) -> None:
        """Finish the requests that came, and refuse others."""
        self._answers.close()
        self._drawings.close()

    def _answer(self, rows: list[Row]) -> list[Reply]:
        self.num_running = len(rows)
        try:
            return reply_to(
                self.session.model,
                self.session.processor,
                [row.prompt for row in rows],
                batch_size=len(rows),
                on_part=lambda index, part: self._take_part(rows[index], part),
                cancelled=[row.cancelled for row in rows],
            )
        finally:
            self.num_running = 0

    def _take_part(self, row: Row, part: Part) -> None:
        if isinstance(part, ImagePart) and self.session.pipeline is not None:
            settings = row.settings.of_image(len(row.drawings))
            row.drawings.append(self._drawings.submit((part.visual_tokens, settings)))
            row.put((part, row.drawings[-1]))
            if row.cancelled.is_set():  # meanwhile
                row.cancel()
        else:
            row.put(part)

    def _draw(self, items: list[tuple[Tensor, SamplerSettings]]) -> list[tuple[Image.Image, ...]]:
        tokens = torch.stack([tokens for tokens, _ in items])
        seeds = [settings.seed for _, settings in items]
        return draw_each(self.session.visualizer, tokens, items[0][1], seeds)
