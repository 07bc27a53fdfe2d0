"""Answers while they are generated: pieces of text and finished images of each row, and what ends a row."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, TypeVar

import torch
from torch import Tensor
from transformers import StoppingCriteria

from metamorph.models.generation import GeneratedVisualTokens
from metamorph.models.processing_metamorph import ImagePart, MetaMorphProcessor, TextPart


Part = TextPart | ImagePart
FinishReason = Literal["stop", "length", "cancelled"]
OnPart = Callable[[Part], object]
Result = TypeVar("Result")


@dataclass
class AnswerDecoder:
    """Turns the ids of one answer, one by one, into pieces of text and images.

    The pieces of text between two images join to what the tokenizer decodes at once. A piece is held back while it ends
    inside a character or could begin a stop string.
    """

    processor: MetaMorphProcessor
    limit: int
    """Tokens of the answer, visual ones included."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer; they are not part of it."""
    cancelled: threading.Event = field(default_factory=threading.Event)
    on_part: Callable[[Part], Part | None] | None = None
    """Called with each piece; the part that it returns, if any, takes its place."""
    parts: list[Part] = field(default_factory=list)
    """The answer so far, its texts joined."""
    num_tokens: int = 0
    finish_reason: FinishReason | None = None
    """Why the answer has ended: an end of turn or a stop string, the limit, or `cancelled`."""
    _ids: list[int] = field(default_factory=list)  # of the text since the last image
    _decoded: int = 0  # ids before this are in `_text`
    _context: int = 0  # decoding starts here: spaces depend on what is before
    _held: str = ""
    _visual_tokens: list[Tensor] = field(default_factory=list)  # of an image that is not finished

    def __post_init__(self) -> None:
        self._ends = frozenset(self.processor.end_of_turn_token_ids)
        # Llama-3's tokenizer asks to clean up spaces, but that is for WordPiece.
        self._decode = partial(
            self.processor.tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def push(self, token: int, visual_token: Tensor | None) -> bool:
        """Take the next id, and its `[D]` visual token if it is a placeholder; returns whether the answer has ended."""
        if self.finish_reason is not None:
            return True
        self.num_tokens += 1
        if self.cancelled.is_set():
            self.finish("cancelled")
        elif token in self._ends:
            self.finish("stop")
        else:
            if token == self.processor.image_token_id and visual_token is not None:
                self._push_visual(visual_token)
            else:
                self._ids.append(token)
                self._push_text()
            if self.num_tokens >= self.limit and self.finish_reason is None:
                self.finish("length")
        return self.finish_reason is not None

    def finish(self, reason: FinishReason) -> None:
        """End the answer; an image that is not finished is dropped."""
        self._flush()
        self.finish_reason = self.finish_reason or reason

    def _push_visual(self, visual_token: Tensor) -> None:
        if not self._visual_tokens:
            self._flush()
        self._visual_tokens.append(visual_token)
        if self.finish_reason is None and len(self._visual_tokens) == self.processor.num_image_tokens:
            self._add(ImagePart(torch.stack(self._visual_tokens).float().cpu()))
            self._visual_tokens = []

    def _push_text(self) -> None:
        """Decode what is new, from a few ids before it; see `DecodeStream` of tokenizers for the technique."""
        known, text = self._new_text()
        if len(text) <= len(known) or text.endswith("\ufffd"):  # no text, or inside a character
            return
        self._context, self._decoded = self._decoded, len(self._ids)
        self._add_text(text[len(known) :])

    def _new_text(self) -> tuple[str, str]:
        return self._decode(self._ids[self._context : self._decoded]), self._decode(self._ids[self._context :])

    def _add_text(self, text: str, is_last: bool = False) -> None:
        self._held += text
        found = [position for word in self.stop if (position := self._held.find(word)) >= 0]
        if found:
            self._add(TextPart(self._held[: min(found)]))
            self._held, self.finish_reason = "", "stop"
            return
        endings = (n for n in range(len(self._held), 0, -1) if any(w.startswith(self._held[-n:]) for w in self.stop))
        held = 0 if is_last else next(endings, 0)
        self._add(TextPart(self._held[: len(self._held) - held]))
        self._held = self._held[len(self._held) - held :]

    def _flush(self) -> None:
        """Emit what was held back, because the text ends here."""
        if self.finish_reason is None:
            known, text = self._new_text()
            self._add_text(text[len(known) :], is_last=True)
        self._ids, self._decoded, self._context = [], 0, 0

    def _add(self, part: Part) -> None:
        if part == TextPart(""):
            return
        part = (self.on_part(part) if self.on_part is not None else None) or part
        if isinstance(part, TextPart) and self.parts and isinstance(last := self.parts[-1], TextPart):
            self.parts[-1] = TextPart(last.text + part.text)
        else:
            self.parts.append(part)


class AnswerCriteria(StoppingCriteria):
    """Passes each step of `generate` to the rows' decoders, and ends each row on its own."""

    def __init__(self, rows: Sequence[AnswerDecoder], state: GeneratedVisualTokens):
        self.rows, self.state = rows, state

    def __call__(self, input_ids: Tensor, scores: object, **kwargs: object) -> Tensor:
        """[batch] whether each row has ended."""
        tokens = input_ids[:, -1].tolist()
        visual = self.state.steps[-1][:, -1] if self.state.steps else [None] * len(tokens)
        ended = [row.push(token, each) for row, token, each in zip(self.rows, tokens, visual, strict=True)]
        return torch.tensor(ended, device=input_ids.device)


def stream_parts(answer: Callable[[OnPart], Result], cancelled: threading.Event) -> Generator[Part, None, Result]:
    """Run `answer(on_part)`, which `cancelled` ends, in a thread and yield the parts that it passes to `on_part`.

    Closing the generator sets `cancelled` and waits for the thread. The generator returns the result.
    """
    parts: queue.Queue[Part | Future[Result]] = queue.Queue()
    with ThreadPoolExecutor(1, "metamorph-answer") as pool:
        future = pool.submit(answer, parts.put)
        future.add_done_callback(parts.put)
        try:
            while not isinstance(item := parts.get(), Future):
                yield item
        finally:
            cancelled.set()
        return item.result()
