"""Renders the pages and cards that the package writes, Jinja templates in `metamorph/templates/`."""

import base64
import io
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from PIL import Image


def render(template: str, **values: Any) -> str:
    """Render a template such as `data_check.html.jinja`; only HTML is escaped. A name without a value is an error."""
    environment = Environment(
        loader=PackageLoader("metamorph"),
        autoescape=select_autoescape(["html.jinja"], default=False),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(values)


def data_url(image: Image.Image, file_format: str = "PNG") -> str:
    """A URL that contains the file of an image."""
    buffer = io.BytesIO()
    image.save(buffer, format=file_format, quality=85)  # PNG has no quality
    return f"data:image/{file_format.lower()};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
