"""A server on a free port, in a thread of the test."""

import base64
import io
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
from PIL import Image

from metamorph.inference import Session
from metamorph.serving.app import create_app
from metamorph.serving.engine import Engine
from metamorph.serving.limits import Limits
from metamorph.serving.server import Server


@contextmanager
def served(
    session: Session, limits: Limits | None = None, engine: dict | None = None, page: bool = False, **options: Any
) -> Iterator[str]:
    """The URL of a server, with the web `page` or not; `engine` and `options` go to `Engine` and `create_app`."""
    limits = limits or Limits()
    running = Engine(session, **(engine or {}))
    app = create_app(running, model_name="mini", limits=limits, **options)
    if page:
        from metamorph.serving.page import mount_page  # Gradio takes seconds to import

        mount_page(app)
    server = Server(app, running, "127.0.0.1", 0, limits.client_timeout)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        running.close()


def data_url(image: Image.Image, file_format: str = "png") -> str:
    """An image as a `data:` URL."""
    return f"data:image/{file_format};base64,{base64.b64encode(file_of(image, file_format)).decode()}"


def file_of(image: Image.Image, file_format: str = "png") -> bytes:
    """The content of an image's file."""
    file = io.BytesIO()
    image.save(file, file_format)
    return file.getvalue()


def image_of(url: str) -> Image.Image:
    """The image of a `data:` URL or base64 text."""
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2] or url)))


def error_of(response: httpx.Response) -> dict:
    """OpenAI's error object."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error
