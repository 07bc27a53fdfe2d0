"""The vision tower and what prepares images for it, as one part of a diffusers pipeline."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from PIL import Image

from metamorph.models.image_processing import to_rgb
from metamorph.models.vision_tower import MetaMorphConfig, VisionTower
from metamorph.visualization.pixels import PixelFormat, crop_square


TOKEN_FIELDS = ("mm_vision_select_layer", "image_token_reduction", "normalize_vision", "apply_softmax")
"""Fields of a MetaMorph configuration that, with `num_image_tokens`, decide what the visual tokens of an image are."""


class VisualTokenEncoder(ModelMixin, ConfigMixin):
    """Images to visual tokens `[images, N, D]`, with the crop, size and token options of the visualizer's training.

    The first six options are those of [`MetaMorphConfig`]; `vision_config` is a dict with its `model_type`. The others
    describe the pixels: `image_mean` is subtracted from each channel in 0..1, which is then divided by `image_std`, and
    `resample` is Pillow's number of the filter for resizing.
    """

    @register_to_config
    def __init__(
        self,
        vision_config: dict[str, Any],
        mm_vision_select_layer: int = -1,
        num_image_tokens: int = 64,
        image_token_reduction: str = "interpolation",
        normalize_vision: bool = True,
        apply_softmax: bool = False,
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
        resample: int = Image.Resampling.BICUBIC.value,
    ) -> None:
        super().__init__()
        config = MetaMorphConfig(
            vision_config=dict(vision_config),
            mm_vision_select_layer=mm_vision_select_layer,
            num_image_tokens=num_image_tokens,
            image_token_reduction=image_token_reduction,
            normalize_vision=normalize_vision,
            apply_softmax=apply_softmax,
        )
        self.tower = VisionTower(config)
        self.num_features = config.vision_feature_size
        self.pixel_format = PixelFormat(
            size=config.vision_image_size,
            mean=tuple(image_mean),
            std=tuple(image_std),
            resample=Image.Resampling(resample),
        )

    @classmethod
    def from_tower(cls, tower: VisionTower, config: MetaMorphConfig, pixel_format: PixelFormat) -> "VisualTokenEncoder":
        """Wrap a loaded tower that was built with `config`."""
        vision_config = config.vision_config.to_dict()
        vision_config.pop("_name_or_path", None)  # a path of this machine
        with torch.device("meta"):  # these weights are replaced
            encoder = cls(
                vision_config=vision_config,
                num_image_tokens=config.num_image_tokens,
                **{name: getattr(config, name) for name in TOKEN_FIELDS},
                image_mean=pixel_format.mean,
                image_std=pixel_format.std,
                resample=pixel_format.resample.value,
            )
        encoder.tower = tower
        return encoder.eval()

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Encode `pixel_values` `[images, 3, S, S]` in the tower's own format to visual tokens `[images, N, D]`."""
        return self.tower(pixel_values)

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image.Image], batch_size: int = 64) -> torch.Tensor:
        """Encode the central squares of images of any size and mode: `[images, N, D]` float32 on the tower's device."""
        if not images:
            raise ValueError("there are no images to encode; give at least one")
        chunks = []
        for start in range(0, len(images), batch_size):
            squares = [crop_square(to_rgb(image)) for image in images[start : start + batch_size]]
            pixels = torch.stack([self.pixel_format.pixels(square) for square in squares])
            chunks.append(self(pixels.to(self.device)).float())
        return torch.cat(chunks)
