"""A conversation of several turns, whose images stay visual tokens and whose keys and values stay in the cache."""

from __future__ import annotations

import threading
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from metamorph.inference.prefix_cache import PrefixCache
from metamorph.inference.prompt import Images, Prompt, open_images, place_media
from metamorph.inference.reply import Reply
from metamorph.inference.streaming import OnPart, Part, stream_parts
from metamorph.models.processing_metamorph import ImagePart, TextPart
from metamorph.models.sequence.conversations import split_at_images


if TYPE_CHECKING:
    from metamorph.inference.session import Session


class Chat:
    """A conversation with a [`Session`]: its earlier turns and their images are context of the later ones.

    A turn computes only its own tokens. Images are encoded once, and generated ones are never drawn to be read again.

    Attributes:
        messages: The conversation so far, as `apply_chat_template` takes it.
    """

    def __init__(self, session: Session, system: str | None = None) -> None:
        self.session = session
        self.system = system
        self.messages: list[dict[str, Any]] = []
        self._cache = PrefixCache(session.model)
        self._cancelled = threading.Event()
        self.reset()

    def reply(self, prompt: str, images: Images = (), **options: Any) -> Reply:
        """Answer the next turn. The arguments are those of [`Session.reply`].

        An answer that fails, or is stopped before its first word, leaves no turn.
        """
        return self._reply(self.messages, self._turn(prompt, images), **options)

    def stream(self, prompt: str, images: Images = (), **options: Any) -> Generator[Part, None, Reply]:
        """Yield the pieces of the answer to the next turn, as [`Session.stream`]. `stop` or closing ends the answer."""
        turn, cancelled = self._turn(prompt, images), threading.Event()
        self._cancelled = cancelled  # here: `stop` may come before the thread
        return stream_parts(
            lambda on_part: self._reply(self.messages, turn, on_part=on_part, cancelled=cancelled, **options), cancelled
        )

    def stop(self) -> None:
        """End the answer that is being generated, from another thread; what it has so far is kept."""
        self._cancelled.set()

    def undo(self) -> dict[str, Any]:
        """Remove the last turn and its answer; returns the turn's message. Without a turn it is a `ValueError`."""
        self.messages, turn = self._before_answer()
        return turn

    def retry(self, **options: Any) -> Reply:
        """Replace the last answer by another one, for example with other `sampling`.

        It stays if the new one fails, or is stopped before its first word.
        """
        return self._reply(*self._before_answer(), **options)

    def reset(self) -> None:
        """Start again, with the system message only."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]

    def _before_answer(self) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """The messages before the last turn, and its own."""
        if not self.messages or self.messages[-1]["role"] != "assistant":
            raise ValueError("the conversation has no answer yet")
        *earlier, turn, _ = self.messages
        return earlier, turn

    def _reply(
        self,
        earlier: list[dict[str, Any]],
        turn: dict[str, Any],
        on_part: OnPart | None = None,
        cancelled: threading.Event | None = None,
        **options: Any,
    ) -> Reply:
        self._cancelled = cancelled or threading.Event()
        prompt = Prompt([*earlier, turn])
        reply = self.session.answer(prompt, on_part=on_part, cancelled=self._cancelled, cache=self._cache, **options)
        if reply.parts or reply.finish_reason != "cancelled":
            self.messages = [*earlier, turn, {"role": "assistant", "content": list(reply.parts)}]
        return reply

    def _turn(self, prompt: str, images: Images) -> dict[str, Any]:
        """The user's message, its images encoded."""
        text, opened = place_media(prompt, open_images(images))
        encoded = iter(self._encode(opened) if opened else ())
        pieces = split_at_images(text)
        return {"role": "user", "content": [TextPart(p) if isinstance(p, str) else next(encoded) for p in pieces]}

    @torch.no_grad()
    def _encode(self, images: tuple[Image.Image, ...]) -> list[ImagePart]:
        model = self.session.model
        pixel_values = self.session.processor(images=list(images))["pixel_values"]
        tokens = model.get_visual_tokens(pixel_values.to(model.device, model.dtype))
        return [ImagePart(each.float().cpu(), (image,)) for each, image in zip(tokens, images, strict=True)]
