"""From a picture of any mode and shape to the exact square that the vision tower expects."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BaseImageProcessor

# Not from the package root: there, without torchvision, older releases of our range show a dummy that asks for it, and
# newer ones warn that they fall back to these.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil


def load_image_processor(name_or_path: str) -> BaseImageProcessor:
    """Load the image processor of a vision model with the Pillow backend, so that torchvision changes no pixel.

    Args:
        name_or_path: A folder with a `preprocessor_config.json`, or an id on the Hub.
    """
    return AutoImageProcessor.from_pretrained(name_or_path, backend="pil", trust_remote_code=False)


def square_image_processor(image_processor: BaseImageProcessor, image_size: int | None = None) -> BaseImageProcessor:
    """Return a copy of `image_processor` that turns every image into a square, without cutting anything off.

    CLIP and DINOv2 resize the shorter side and then crop the centre: what is outside would be lost.

    Args:
        image_processor: A SigLIP, SigLIP 2, CLIP or DINOv2 (BiT) image processor.
        image_size: Side of the square in pixels; by default the processor's own size.

    Raises:
        ValueError: If the size is neither given nor square in `image_processor`.
    """
    result = copy.deepcopy(image_processor)
    if hasattr(result, "max_num_patches"):  # SigLIP 2 NaFlex: makes patches; the tower wants pixels
        image_size = image_size or round(result.max_num_patches**0.5) * result.patch_size
        result = SiglipImageProcessorPil(
            resample=result.resample, image_mean=result.image_mean, image_std=result.image_std
        )
    side = image_size or _own_size(result)
    result.size = {"height": side, "width": side}
    result.do_resize = True
    if getattr(result, "do_center_crop", None):
        result.do_center_crop = False
        result.crop_size = {"height": side, "width": side}
    return result


def _own_size(image_processor: BaseImageProcessor) -> int:
    crop = image_processor.crop_size if getattr(image_processor, "do_center_crop", False) else None
    sizes = dict(crop or image_processor.size)
    height, width = (sizes.get(side) or sizes.get("shortest_edge") for side in ("height", "width"))
    if height is None or height != width:
        raise ValueError(
            f"{type(image_processor).__name__} has the size {sizes}, which is not a square; pass the tower's image size"
        )
    return height


def flatten_images(images: Any) -> list[Image.Image]:
    """The images of arbitrarily nested lists, in reading order; none for None."""
    if images is None:
        return []
    if isinstance(images, Image.Image):
        return [images]
    return [image for item in images for image in flatten_images(item)]


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB: 16-bit values are scaled, transparent pixels become white."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(_to_8_bit(np.asarray(image), image.mode)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _to_8_bit(values: np.ndarray, mode: str) -> np.ndarray:
    """Scale grey values to 0..255; where the mode does not tell their range, the largest value does."""
    values = np.nan_to_num(values.astype(np.float64))
    largest = values.max(initial=0)
    if mode.startswith("I;16") or largest > 255:
        values = values / 257
    elif mode == "F" and largest <= 1:
        values = values * 255
    return values.clip(0, 255).round().astype(np.uint8)


def pixel_table(image_processor: BaseImageProcessor) -> np.ndarray:
    """What rescaling and normalising make of each 8-bit value: float32 `[3, 256]`.

    Looking values up is several times faster than computing them for every pixel, gives the same bits as the Pillow
    backend of the image processors, and does not depend on the backend that is installed.
    """
    values = np.arange(256, dtype=np.float64)
    if image_processor.do_rescale:
        values = values * image_processor.rescale_factor
    table = np.tile(values.astype(np.float32), (3, 1))
    if image_processor.do_normalize:
        mean, std = (
            np.asarray(statistic, dtype=np.float32)[:, None]
            for statistic in (image_processor.image_mean, image_processor.image_std)
        )
        table = (table - mean) / std
    return table


def preprocess_images(
    images: Sequence[Image.Image],
    image_processor: BaseImageProcessor,
    aspect_ratio: str = "square",
    table: np.ndarray | None = None,
) -> torch.Tensor:
    """Turn images into the pixel values of the vision tower.

    Args:
        images: At least one image, of any mode and size.
        image_processor: Result of [`square_image_processor`].
        aspect_ratio: `square` stretches the image; `pad` first adds borders of the mean colour.
        table: Result of [`pixel_table`], for callers that keep it.

    Returns:
        float32 `[images, 3, height, width]`, rescaled and normalised.
    """
    table = pixel_table(image_processor) if table is None else table
    width, height = image_processor.size["width"], image_processor.size["height"]
    pixel_values = np.empty((len(images), 3, height, width), dtype=np.float32)
    for image, target in zip(images, pixel_values, strict=True):
        image = to_rgb(image)
        if aspect_ratio == "pad":
            image = _padded(image, image_processor.image_mean)
        # Resized here: the backends of the image processors differ by more than rounding.
        square = np.asarray(image.resize((width, height), resample=image_processor.resample))
        for channel in range(3):
            np.take(table[channel], square[..., channel], out=target[channel])
    return torch.from_numpy(pixel_values)


def _padded(image: Image.Image, mean: Sequence[float]) -> Image.Image:
    side = max(image.size)
    canvas = Image.new("RGB", (side, side), tuple(round(255 * value) for value in mean))
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return canvas
