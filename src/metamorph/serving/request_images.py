"""Images of a request: data URLs, uploads, or URLs of allowed hosts, within the limits of the server."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Collection
from pathlib import Path

from PIL import Image

from metamorph.inference.media import load_video
from metamorph.models.image_files import MediaError, load_image
from metamorph.models.image_inputs import decode_data_url
from metamorph.serving.errors import ApiError
from metamorph.serving.limits import Limits
from metamorph.serving.remote_images import fetch_image


class RequestImages:
    """Opens the images of one request, whose number and pixels it counts. It never opens files of the server."""

    def __init__(self, limits: Limits, hosts: Collection[str] = ()) -> None:
        self.limits, self.hosts = limits, hosts
        self.num_images = 0
        self._pixels_left = limits.max_pixels

    async def open_url(self, url: str, param: str) -> Image.Image:
        """The image of a `data:` URL, or of an http(s) URL of an allowed host."""
        self._count(param)
        if url.startswith("data:"):
            return await self._open(await asyncio.to_thread(_decode, url, param), param)
        size, timeout = self.limits.max_body, self.limits.client_timeout
        content = await asyncio.to_thread(fetch_image, url, self.hosts, max_bytes=size, timeout=timeout)
        return await self._open(content, param)

    async def open_upload(self, content: bytes, param: str) -> Image.Image:
        """The image of a file's content."""
        self._count(param)
        return await self._open(content, param)

    async def open_video(self, file: Path) -> list[Image.Image]:
        """Frames of a video, which count as images: one a second, or 8 evenly spread ones."""
        try:
            frames = await asyncio.to_thread(load_video, file, name=file.name, max_pixels=self._pixels_left)
        except MediaError as error:
            limit = f" (the images of a request may have {self.limits.max_pixels} pixels together)"
            message = str(error) + (limit if error.kind == "image_too_large" else "")
            raise ApiError(message, param=file.name, code=error.kind) from error
        self._count(file.name, len(frames))
        self._pixels_left -= sum(frame.width * frame.height for frame in frames)
        return frames

    def _count(self, param: str, number: int = 1) -> None:
        self.num_images += number
        if self.num_images > self.limits.max_images:
            message = f"there are more than {self.limits.max_images} images in the request"
            raise ApiError(message, param=param, code="too_many_images")

    async def _open(self, content: bytes, param: str) -> Image.Image:
        try:
            image = await asyncio.to_thread(
                load_image, io.BytesIO(content), name="the image", max_pixels=self._pixels_left
            )
        except MediaError as error:
            raise ApiError(f"{param}: {error}", param=param, code=error.kind) from error
        self._pixels_left -= image.width * image.height
        return image


def _decode(url: str, param: str) -> bytes:
    try:
        return decode_data_url(url)
    except ValueError as error:
        raise ApiError(f"{param}: {error}", param=param, code="image_url") from error
