"""`POST /v1/chat/completions`: OpenAI's chat, with images as OpenRouter and LiteLLM send them."""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from fastapi.responses import StreamingResponse
from PIL import Image
from pydantic import BaseModel, BeforeValidator, Field
from starlette.types import Receive, Scope, Send

from metamorph.inference.prompt import Prompt
from metamorph.inference.reply import Reply
from metamorph.inference.streaming import Part
from metamorph.models.sequence.conversations import ImagePart, TextPart
from metamorph.serving.engine import Answers
from metamorph.serving.errors import as_api_error
from metamorph.serving.request_images import RequestImages
from metamorph.serving.service import MAX_CHOICES, Answering, Service, data_url, turn


logger = logging.getLogger(__name__)


class ImageUrl(BaseModel):
    """Where an image is."""

    url: str
    """A `data:` URL, or an http(s) URL of an allowed host."""


def _as_object(url: Any) -> Any:
    return {"url": url} if isinstance(url, str) else url


class TextContent(BaseModel):
    """A part of a message: text."""

    type: Literal["text"]
    text: str


class ImageContent(BaseModel):
    """A part of a message: an image."""

    type: Literal["image_url"]
    image_url: Annotated[
        ImageUrl,
        BeforeValidator(_as_object, json_schema_input_type=ImageUrl | str),
    ]


Content = Annotated[TextContent | ImageContent, Field(discriminator="type")]


def _as_parts(content: Any) -> Any:
    if content is None:
        return []
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class Message(BaseModel):
    """A message of the conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        list[Content], BeforeValidator(_as_parts, json_schema_input_type=str | list[Content] | None)
    ] = []
    images: Annotated[list[ImageContent], BeforeValidator(lambda images: images or [])] = []
    """Images of an earlier answer, after its text, as this API returned them."""


class StreamOptions(BaseModel):
    """Options of a stream."""

    include_usage: bool = False


class ChatRequest(Answering):
    """The body of a request."""

    messages: list[Message] = Field(min_length=1)
    modalities: list[Literal["text", "image"]] = Field(["text", "image"], min_length=1)
    """`["text"]` is an answer without images, `["image"]` one image; by default the model decides."""
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    """The newer name of `max_tokens`, which it precedes."""
    stop: Annotated[
        list[Annotated[str, Field(min_length=1)]],
        Field(max_length=4),
        BeforeValidator(lambda stop: [stop] if isinstance(stop, str) else stop, json_schema_input_type=str | list[str]),
    ] = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    content_format: Literal["string", "parts"] = "string"
    """`string` puts images into `images`; `parts` makes `content` the list of texts and images in order."""

    @property
    def is_image_only(self) -> bool:
        """Whether the answer is one image."""
        return set(self.modalities) == {"image"}

    @property
    def limit(self) -> tuple[int | None, str]:
        """The limit on tokens, and its name in the request."""
        is_new = self.max_completion_tokens is not None
        return (self.max_completion_tokens, "max_completion_tokens") if is_new else (self.max_tokens, "max_tokens")


def chat_router(service: Service) -> APIRouter:
    """The route of this dialect."""
    router = APIRouter(prefix="/v1")

    @router.post("/chat/completions", response_model=None)
    async def chat_completions(request: ChatRequest) -> dict[str, Any] | StreamingResponse:
        """Answer a conversation in text and images."""
        service.check_model(request.model)
        if "image" in request.modalities and "modalities" in request.model_fields_set:
            service.check_drawing("modalities")
        images = service.images()
        messages = [await _turn(message, index, images) for index, message in enumerate(request.messages)]
        may_draw = service.engine.can_draw and "image" in request.modalities
        prompt = Prompt(messages, draw=request.is_image_only, allow_images=may_draw, stop=tuple(request.stop))
        answers = await service.submit(prompt, request, request.n, *request.limit)
        completion = _Completion(service, request, images.num_images)
        if not request.stream:
            return await completion.whole(answers)
        events = completion.events(answers)
        try:
            first = await anext(events)  # before the status is sent: the answer may fail, or be refused
        except BaseException:
            answers.cancel()
            raise
        return EventStream(first, events, answers)

    return router


async def _turn(message: Message, index: int, images: RequestImages) -> dict[str, Any]:
    parts: list[str | Image.Image] = []
    for place, given in (("content", message.content), ("images", message.images)):
        for number, part in enumerate(given):
            if isinstance(part, TextContent):
                parts.append(part.text)
            else:
                parts.append(await images.open_url(part.image_url.url, f"messages[{index}].{place}[{number}]"))
    return turn("system" if message.role == "developer" else message.role, parts)


class _Completion:
    """Writes the answers to one request as OpenAI's objects."""

    def __init__(self, service: Service, request: ChatRequest, num_images: int) -> None:
        self.service, self.request, self.num_images = service, request, num_images
        self.head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": service.model_name,
        }

    async def whole(self, answers: Answers) -> dict[str, Any]:
        """The completion."""
        replies = await answers.replies()
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", **await self._content(reply.parts)},
                "finish_reason": self._reason(reply),
                "logprobs": None,
            }
            for index, reply in enumerate(replies)
        ]
        return {**self.head, "object": "chat.completion", "choices": choices, "usage": self._usage(replies)}

    async def events(self, answers: Answers) -> AsyncGenerator[str, None]:
        """Server-sent events: a chunk for each piece of text and each finished image."""
        replies: dict[int, Reply] = {}
        numbers: dict[int, int] = {}  # images so far of the choices that have begun
        async for index, piece in answers:
            role = {} if index in numbers else {"role": "assistant"}
            number = numbers.setdefault(index, 0)
            if isinstance(piece, Reply):
                replies[index] = piece
                yield self._choice(index, role, self._reason(piece))
            else:
                numbers[index] += isinstance(piece, ImagePart)
                yield self._choice(index, {**role, **await self._content([piece], number, streamed=True)})
        usage = self._usage([replies[index] for index in range(self.request.n)])
        if self._has_usage:
            yield self._event([], usage)
        yield "data: [DONE]\n\n"

    @property
    def _has_usage(self) -> bool:
        return bool(self.request.stream_options and self.request.stream_options.include_usage)

    async def _content(self, parts: Sequence[Part], number: int = 0, streamed: bool = False) -> dict[str, Any]:
        """Parts of an answer as fields of a message or delta; `number` images came before."""
        written: list[dict[str, Any]] = []
        for part in parts:
            if isinstance(part, TextPart):
                written.append({"type": "text", "text": part.text})
            else:
                written.append({"type": "image_url", "index": number, "image_url": {"url": await data_url(part)}})
                number += 1
        if self.request.content_format == "parts":
            return {"content": written}
        text = "".join(part["text"] for part in written if part["type"] == "text")
        images = [part for part in written if part["type"] == "image_url"]
        content = {} if streamed and images else {"content": text}
        return {**content, "images": images} if images else content

    def _reason(self, reply: Reply) -> str:
        """An answer that is one image ends with it."""
        return "stop" if self.request.is_image_only else reply.finish_reason

    def _usage(self, replies: Sequence[Reply]) -> dict[str, Any]:
        return self.service.account(replies, self.num_images).chat()

    def _choice(self, index: int, delta: dict[str, Any], reason: str | None = None) -> str:
        return self._event([{"index": index, "delta": delta, "finish_reason": reason, "logprobs": None}])

    def _event(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> str:
        chunk = {**self.head, "object": "chat.completion.chunk", "choices": choices}
        return f"data: {json.dumps({**chunk, 'usage': usage} if self._has_usage else chunk)}\n\n"


class EventStream(StreamingResponse):
    """Server-sent events of answers, which end with it."""

    def __init__(self, first: str, events: AsyncGenerator[str, None], answers: Answers) -> None:
        self.answers = answers
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # the latter: nginx passes each event on
        super().__init__(self._all(first, events), headers=headers, media_type="text/event-stream")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.answers.cancel()

    @staticmethod
    async def _all(first: str, events: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
        yield first
        try:
            async for event in events:
                yield event
        except Exception as error:
            logger.exception("an answer failed after it began")
            yield f"data: {json.dumps(as_api_error(error).body)}\n\n"
