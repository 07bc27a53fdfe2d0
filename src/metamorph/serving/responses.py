"""`POST /v1/responses`: OpenAI's responses, whose items keep texts and images in order; not stored, not streamed."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from PIL import Image
from pydantic import BaseModel, BeforeValidator, Field

from metamorph.inference.prompt import Prompt
from metamorph.inference.reply import Reply
from metamorph.models.sequence.conversations import TextPart
from metamorph.serving.errors import ApiError
from metamorph.serving.request_images import RequestImages
from metamorph.serving.service import Answering, Service, base64_of, turn


NOT_SUPPORTED = {
    "stream": "responses are not streamed: leave it out, or use /v1/chat/completions",
    "previous_response_id": "responses are not stored: send the earlier items in input",
    "conversation": "conversations are not stored: send the earlier items in input",
    "background": "responses are not stored, so they cannot be fetched later",
}
"""Fields that would change the answer's form, and what to do instead."""


class InputText(BaseModel):
    """A part of a message: text, the user's or an earlier answer's."""

    type: Literal["input_text", "output_text"]
    text: str


class InputImage(BaseModel):
    """A part of a message: an image."""

    type: Literal["input_image"]
    image_url: str
    """A `data:` URL, or an http(s) URL of an allowed host."""


def _as_parts(content: Any) -> Any:
    return [{"type": "input_text", "text": content}] if isinstance(content, str) else content


InputParts = list[Annotated[InputText | InputImage, Field(discriminator="type")]]


class InputMessage(BaseModel):
    """An item of the input: a message."""

    type: Literal["message"]
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[InputParts, BeforeValidator(_as_parts, json_schema_input_type=str | InputParts)]


class InputDrawing(BaseModel):
    """An item of the input: an image of an earlier answer."""

    type: Literal["image_generation_call"]
    result: str
    """The file in base64."""


def _with_type(item: Any) -> Any:
    return {"type": "message", **item} if isinstance(item, dict) else item


def _as_items(given: Any) -> Any:
    return [{"type": "message", "role": "user", "content": given}] if isinstance(given, str) else given


InputItem = Annotated[
    Annotated[InputMessage | InputDrawing, Field(discriminator="type")],
    BeforeValidator(_with_type),
]


class ToolChoice(BaseModel):
    """Which tool is used; drawing is the only one."""

    type: Literal["image_generation"]


class ResponseRequest(Answering):
    """The body of a request."""

    input: Annotated[
        list[InputItem],
        Field(min_length=1),
        BeforeValidator(_as_items, json_schema_input_type=str | list[InputMessage | InputDrawing]),
    ]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    tool_choice: Literal["auto", "none", "required"] | ToolChoice = "auto"
    """`none` is an answer without images, `{"type": "image_generation"}` or `required` one image."""
    stream: Any = None
    previous_response_id: Any = None
    conversation: Any = None
    background: Any = None


def responses_router(service: Service) -> APIRouter:
    """The route of this dialect."""
    router = APIRouter(prefix="/v1")

    @router.post("/responses")
    async def respond(request: ResponseRequest) -> dict[str, Any]:
        """Answer a conversation with items of text and images in order."""
        service.check_model(request.model)
        for name, advice in NOT_SUPPORTED.items():
            if getattr(request, name):
                raise ApiError(f"{name} is not supported: {advice}", param=name, code="unsupported_parameter")
        is_drawing = request.tool_choice not in ("auto", "none")
        if is_drawing:
            service.check_drawing("tool_choice")
        images = service.images()
        messages = await _messages(request, images)
        may_draw = service.engine.can_draw and request.tool_choice != "none"
        prompt = Prompt(messages, draw=is_drawing, allow_images=may_draw)
        answers = await service.submit(prompt, request, 1, request.max_output_tokens, "max_output_tokens")
        (reply,) = await answers.replies()
        is_cut = reply.finish_reason == "length" and not is_drawing  # one image ends at its last token
        return {
            "id": _new_id("resp"),
            "object": "response",
            "created_at": int(time.time()),
            "status": "incomplete" if is_cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "error": None,
            "model": service.model_name,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "output": await _items(reply),
            "previous_response_id": None,
            "store": False,
            "temperature": request.sampling(0).temperature,
            "top_p": request.sampling(0).top_p,
            "parallel_tool_calls": False,
            "tool_choice": "auto",
            "tools": [],
            "metadata": {},
            "usage": service.account([reply], images.num_images).responses(),
        }

    return router


async def _messages(request: ResponseRequest, images: RequestImages) -> list[dict[str, Any]]:
    """The conversation; neighbouring items of the assistant are one answer."""
    turns: list[tuple[str, list[str | Image.Image]]] = []
    if request.instructions:
        turns.append(("system", [request.instructions]))
    for index, item in enumerate(request.input):
        role = "assistant" if isinstance(item, InputDrawing) else item.role.replace("developer", "system")
        parts = await _parts(item, f"input[{index}]", images)
        if turns and role == turns[-1][0] == "assistant":
            turns[-1][1].extend(parts)
        else:
            turns.append((role, parts))
    return [turn(role, parts) for role, parts in turns]


async def _parts(item: InputMessage | InputDrawing, name: str, images: RequestImages) -> list[str | Image.Image]:
    if isinstance(item, InputDrawing):
        return [await images.open_url(f"data:;base64,{item.result}", f"{name}.result")]
    return [
        part.text if isinstance(part, InputText) else await images.open_url(part.image_url, f"{name}.content[{number}]")
        for number, part in enumerate(item.content)
    ]


async def _items(reply: Reply) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = []
    for part in reply.parts:
        if isinstance(part, TextPart):
            content: Sequence[dict[str, Any]] = [{"type": "output_text", "text": part.text, "annotations": []}]
            items.append({"type": "message", "id": _new_id("msg"), "role": "assistant", "content": content})
        else:
            items.append({"type": "image_generation_call", "id": _new_id("ig"), "result": await base64_of(part)})
        items[-1]["status"] = "completed"
    return items


def _new_id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"
