"""`POST /v1/images/generations` and `/v1/images/edits`: one drawing for each answer, in the form of OpenAI's images."""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Form, UploadFile
from PIL import Image
from pydantic import Field

from metamorph.inference.prompt import Prompt
from metamorph.models.sequence.conversations import ImagePart
from metamorph.serving.errors import ApiError
from metamorph.serving.service import MAX_CHOICES, Drawing, Service, base64_of, turn


class GenerationRequest(Drawing):
    """The body of a request for images."""

    prompt: str = Field(min_length=1)
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    size: str | None = None
    """`auto` or the one size that the visualizer draws."""
    response_format: Literal["b64_json"] = "b64_json"
    """There are no URLs: nothing is kept."""
    output_format: Literal["png", "jpeg", "webp"] = "png"
    """Format of the files."""
    stream: bool = False
    """Refused if true: drawings are not streamed."""


class EditRequest(GenerationRequest):
    """The fields of a form that asks for changed images."""

    image: list[UploadFile] = []
    """Files of images."""
    images: list[UploadFile] = Field([], alias="image[]")
    """Further ones: this is how clients send several."""
    mask: UploadFile | None = None
    """Refused: the model redraws all of an image."""


def images_router(service: Service) -> APIRouter:
    """The routes of this dialect."""
    router = APIRouter(prefix="/v1")

    @router.post("/images/generations")
    async def generate(request: GenerationRequest) -> dict[str, Any]:
        """Draw what a prompt describes."""
        return await _draw(service, request, [])

    @router.post("/images/edits")
    async def edit(request: Annotated[EditRequest, Form(media_type="multipart/form-data")]) -> dict[str, Any]:
        """Draw what a prompt makes of images."""
        if request.mask is not None:
            raise ApiError("mask is not supported: the model redraws all of an image", param="mask")
        uploads = [*request.image, *request.images]
        if not uploads:
            raise ApiError("there is no image: send a file as image, or several as image[]", param="image")
        images = service.images()
        opened = [await images.open_upload(await upload.read(), f"image[{i}]") for i, upload in enumerate(uploads)]
        return await _draw(service, request, opened)

    return router


async def _draw(service: Service, request: GenerationRequest, images: list[Image.Image]) -> dict[str, Any]:
    service.check_model(request.model)
    service.check_drawing("prompt")
    if request.stream:
        raise ApiError("stream is not supported for images: leave it out", param="stream", code="invalid_value")
    width, height = service.engine.image_size
    size = f"{width}x{height}"
    if request.size not in (None, "", "auto", size):
        message = f"size {request.size} cannot be drawn; the sizes that can be are auto and {size}"
        raise ApiError(message, param="size", code="invalid_value")
    prompt = Prompt([turn("user", [*images, request.prompt])], draw=True)
    replies = await (await service.submit(prompt, request, request.n)).replies()
    drawn = [part for reply in replies for part in reply.parts if isinstance(part, ImagePart)]
    return {
        "created": int(time.time()),
        "data": [{"b64_json": await base64_of(part, request.output_format)} for part in drawn],
        "output_format": request.output_format,
        "size": size,
        "usage": service.account(replies, len(images)).responses(),
    }
