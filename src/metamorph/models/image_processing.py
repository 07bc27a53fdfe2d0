"""Images of any mode and shape to the exact square that the vision tower expects."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from PIL import Image
from transformers import BaseImageProcessor

# Not from the package root: without torchvision, older releases have a dummy there, and newer ones warn
# that they fall back to these.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from metamorph.models.configuration_metamorph import MAX_IMAGE_SIDE


_BAND_PIXELS = 2**20  # pixels that are converted at a time
_MAX_SIDE = 2**16  # longer images are shrunk before resizing: Pillow's weights take 32 bytes for each pixel of a side
_MAX_SQUARE = 2**13  # the same before padding to a square: its time grows with the square of the side


def load_image_processor(name_or_path: str) -> BaseImageProcessor:
    """Load the image processor of a vision model with the Pillow backend, so torchvision changes no pixel."""
    return AutoImageProcessor.from_pretrained(name_or_path, backend="pil", trust_remote_code=False)


def square_image_processor(image_processor: BaseImageProcessor, image_size: int | None = None) -> BaseImageProcessor:
    """Copy a SigLIP, SigLIP 2, CLIP or DINOv2 (BiT) image processor to one that makes squares without cropping.

    CLIP and DINOv2 resize the shorter side and then crop the centre: the rest of the image would be lost. `image_size`
    is the side in pixels, by default the processor's own.
    """
    result = copy.deepcopy(image_processor)
    if hasattr(result, "max_num_patches"):  # SigLIP 2 NaFlex makes patches; the tower expects pixels
        image_size = image_size or round(result.max_num_patches**0.5) * result.patch_size
        result = SiglipImageProcessorPil(
            resample=result.resample, image_mean=result.image_mean, image_std=result.image_std
        )
    side = image_size or _own_size(result)
    if not (isinstance(side, int) and 0 < side <= MAX_IMAGE_SIDE):
        raise ValueError(f"{type(result).__name__}: images of {side!r} pixels a side must have 1 to {MAX_IMAGE_SIDE}")
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


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB: 16-bit values are scaled, transparent pixels become white.

    Intermediate results take several times the memory of the image, so it is converted in bands of rows.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith(("I", "F")):
        largest = max((_finite(band).max(initial=0) for _, band in _bands(image)), default=0)
        convert: Callable[[Image.Image], Image.Image] = partial(_grey_to_rgb, largest=largest)
    elif image.has_transparency_data:
        convert = _on_white
    else:
        return image.convert("RGB")
    result = Image.new("RGB", image.size)
    for top, band in _bands(image):
        result.paste(convert(band), (0, top))
    return result


def _bands(image: Image.Image, row_pixels: int | None = None) -> Iterator[tuple[int, Image.Image]]:
    """Cut an image into bands of rows of `row_pixels` (by default its width), each with the number of its first row."""
    rows = max(_BAND_PIXELS // max(row_pixels or image.width, 1), 1)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _on_white(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _grey_to_rgb(image: Image.Image, largest: float) -> Image.Image:
    """Scale grey values to 0..255; if the mode does not define their range, the largest value decides."""
    values = _finite(image)
    if image.mode.startswith("I;16") or largest > 255:
        values = values / 257
    elif image.mode == "F" and largest <= 1:
        values = values * 255
    return Image.fromarray(values.clip(0, 255).round().astype(np.uint8)).convert("RGB")


def _finite(image: Image.Image) -> np.ndarray:
    return np.nan_to_num(np.asarray(image).astype(np.float64))


def pixel_table(image_processor: BaseImageProcessor) -> np.ndarray:
    """Rescaled and normalised value of each 8-bit value: float32 `[3, 256]`.

    Looking values up is several times faster than computing them for every pixel, and gives the same bits as the Pillow
    backend of the image processors, whichever backend is installed.
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
    """Turn images of any mode and size into pixel values of the vision tower: float32 `[images, 3, height, width]`.

    `image_processor` is a result of [`square_image_processor`], and `table` its [`pixel_table`] if that is cached. The
    `aspect_ratio` `square` stretches an image; `pad` first adds borders of the mean colour.
    """
    table = pixel_table(image_processor) if table is None else table
    width, height = image_processor.size["width"], image_processor.size["height"]
    pixel_values = np.empty((len(images), 3, height, width), dtype=np.float32)
    for image, target in zip(images, pixel_values, strict=True):
        image = to_rgb(image)
        # Not by the image processor, whose backends differ by more than rounding.
        if aspect_ratio == "pad":
            image = _resized_with_borders(image, (width, height), image_processor.image_mean, image_processor.resample)
        else:
            image = _shrunk(image, _MAX_SIDE).resize((width, height), resample=image_processor.resample)
        square = np.asarray(image)  # (height, width, 3)
        for channel in range(3):
            np.take(table[channel], square[..., channel], out=target[channel])
    return torch.from_numpy(pixel_values)


def _resized_with_borders(
    image: Image.Image, size: tuple[int, int], mean: Sequence[float], resample: int
) -> Image.Image:
    """Resize an image padded to a square with the mean colour, without that square in memory.

    It could be tens of thousands of pixels wide. Pillow resizes rows first and then columns, so bands of rows are
    padded and resized one by one, and the result for rows of border is known.
    """
    colour = tuple(round(255 * value) for value in mean)
    image = _shrunk(image, _MAX_SQUARE)
    side = max(image.size)
    left, upper = (side - image.width) // 2, (side - image.height) // 2
    columns = Image.new("RGB", (size[0], side), colour)
    for top, band in _bands(image, side):
        rows = Image.new("RGB", (side, band.height), colour)
        rows.paste(band, (left, 0))
        columns.paste(rows.resize((size[0], band.height), resample), (0, upper + top))
    return columns.resize(size, resample)


def _shrunk(image: Image.Image, max_side: int) -> Image.Image:
    """The image, reduced by an integer factor if a side is longer than `max_side`."""
    factor = math.ceil(max(image.size) / max_side)
    return image.reduce(factor) if factor > 1 else image
