"""Images as users pass them to a processor: objects, files, bytes, base64, arrays, tensors, URLs if allowed."""

import base64
import io
import os
from typing import Any
from urllib.request import urlopen

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from transformers.image_utils import infer_channel_dimension_format

from metamorph.models import image_files


_MAX_BYTES = 2**28  # largest file fetched from a URL
_TIMEOUT = 30  # seconds to wait for a URL
_SHOWN = 60  # characters of a string shown in messages


def to_pil_image(image: Any, *, allow_urls: bool = False, input_data_format: str | None = None) -> Image.Image:
    """Open an image, upright according to its EXIF data. Files are read as in training: RGB.

    `image` is a Pillow image; a path; the bytes of a file, or the same in base64, also as a `data:` URL; an http(s)
    address, with `allow_urls` (an untrusted message could name one in your network); an array or tensor of 8-bit values
    or of floats from 0 to 1. `input_data_format` is `channels_first` or `channels_last`, for ambiguous arrays.
    """
    if isinstance(image, Image.Image):
        is_upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
        return image if is_upright else ImageOps.exif_transpose(image)  # copies even upright images
    if isinstance(image, (np.ndarray, torch.Tensor)):
        return _from_array(image, input_data_format)
    source: Any
    if isinstance(image, bytes):
        source, name = io.BytesIO(image), f"an image of {len(image)} bytes"
    elif isinstance(image, os.PathLike):
        source, name = image, os.fspath(image)
    elif isinstance(image, str):
        source, name = _source_of(image, allow_urls), repr(image[:_SHOWN])
        if isinstance(source, io.BytesIO):
            name += ", which is not a file,"
    else:
        raise ValueError(
            f"{type(image).__name__} is not an image: give a Pillow image, a path, bytes, base64, an array or a tensor"
        )
    return image_files.load_image(source, name=name)


def _source_of(text: str, allow_urls: bool) -> str | io.BytesIO:
    """The path, or the content of the file, that a string stands for."""
    if text.startswith(("http://", "https://")):
        if not allow_urls:
            raise ValueError(
                f"{text[:_SHOWN]} is not fetched: download it, or pass images_kwargs={{'allow_urls': True}}"
            )
        try:
            with urlopen(text, timeout=_TIMEOUT) as answer:
                content = answer.read(_MAX_BYTES + 1)
        except (OSError, ValueError) as error:
            raise ValueError(f"{text[:_SHOWN]} cannot be fetched: {error}") from error
        if len(content) > _MAX_BYTES:
            raise ValueError(f"{text[:_SHOWN]} has more than {_MAX_BYTES} bytes")
        return io.BytesIO(content)
    if text.startswith("data:"):
        return io.BytesIO(decode_data_url(text))
    if "\0" not in text and os.path.exists(text):
        return text
    try:
        return io.BytesIO(_decode_base64(text))
    except ValueError as error:
        raise ValueError(f"there is no image file {text[:_SHOWN]!r}, and it is neither a URL nor base64") from error


def decode_data_url(url: str) -> bytes:
    """The content of a `data:` URL in base64; a `ValueError` if it is another one."""
    header, _, data = url.partition(",")
    if not header.endswith(";base64"):
        raise ValueError("the data: URL is not base64: it has no ';base64,'")
    try:
        return _decode_base64(data)
    except ValueError as error:
        raise ValueError(f"the data: URL is not base64: {error}") from error


def _decode_base64(text: str) -> bytes:
    """Decode base64, which may have line breaks."""
    return base64.b64decode(text.encode("ascii").translate(None, b" \t\r\n"), validate=True)


def _from_array(array: np.ndarray | torch.Tensor, input_data_format: str | None) -> Image.Image:
    if isinstance(array, torch.Tensor):
        array = (array.float() if array.is_floating_point() else array).detach().cpu().numpy()
    kind = f"an array of shape {list(array.shape)} and type {array.dtype}"
    if array.ndim not in (2, 3) or array.dtype.kind not in "uif":
        raise ValueError(f"{kind} is not an image")
    if array.ndim == 2:
        array, input_data_format = array[..., None], "channels_last"
    try:
        data_format = input_data_format or infer_channel_dimension_format(array, num_channels=(1, 3, 4))
    except ValueError as error:
        raise ValueError(
            f"{kind} is not an image: neither the first nor the last dimension is a channel dimension"
        ) from error
    if data_format == "channels_first":
        array = np.moveaxis(array, 0, -1)
    is_float = array.dtype.kind == "f"
    largest = 1 if is_float else 255
    if not ((array >= 0) & (array <= largest)).all():  # NaN fails too
        raise ValueError(f"{kind} must have values from 0 to {largest}; is the image normalised already?")
    values = np.rint(array.astype(np.float32) * 255) if is_float else array
    return Image.fromarray(values.astype(np.uint8).squeeze(-1) if array.shape[-1] == 1 else values.astype(np.uint8))
