"""From an image to the square pixels that an encoder takes."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image


@dataclass(frozen=True)
class PixelFormat:
    """Size and normalisation that an encoder was trained with."""

    size: int
    """Side of the square input in pixels."""
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    """Subtracted from each channel (red, green, blue) in 0..1; ½ maps to −1..1 as a VAE wants it."""
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    """Divides each channel afterwards."""
    resample: Image.Resampling = Image.Resampling.BICUBIC

    def pixels(self, square: Image.Image) -> torch.Tensor:
        """A square RGB image as a tensor `[3, size, size]`."""
        if square.size != (self.size, self.size):
            square = square.resize((self.size, self.size), self.resample)
        values = torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 255
        mean, std = torch.tensor(self.mean).view(3, 1, 1), torch.tensor(self.std).view(3, 1, 1)
        return (values - mean) / std


def crop_square(image: Image.Image, place: float = 0.5) -> Image.Image:
    """The largest square of an image; `place` in 0..1 moves it along the longer side (0.5: centre)."""
    width, height = image.size
    side = min(width, height)
    left, top = round((width - side) * place), round((height - side) * place)
    return image.crop((left, top, left + side, top + side))
