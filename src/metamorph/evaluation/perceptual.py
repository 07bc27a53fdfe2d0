"""LPIPS and FID, for those who have the weights of their networks.

Neither network ships with a library that MetaMorph needs, and nothing is downloaded. Both are published as TorchScript
files, for example with NVIDIA's StyleGAN3 metrics (`vgg16.pt`, `inception-2015-12-05.pt`); the flags take such a file.
A TorchScript file is a program: use one from a source that you trust.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from metamorph.flags.extras import install_command


NOT_MEASURED = {
    "lpips": "needs --lpips_weights, a TorchScript file of LPIPS's VGG16 (vgg16.pt of StyleGAN3's metrics)",
    "fid": "needs --inception_weights, a TorchScript file of FID's network (inception-2015-12-05.pt of StyleGAN3's "
    "metrics)",
}
"""Metric → why it was not measured."""
FID_IMAGES = 2048
"""With fewer images than features the covariance is singular, and FID is much too large."""


class ImageFeatures:
    """A TorchScript network from images to features; `options` are keyword arguments of its forward."""

    def __init__(self, file: str | Path, flag: str, device: torch.device | str = "cpu", **options: Any) -> None:
        path = Path(file).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"{flag} {file} does not exist; give a TorchScript file")
        try:
            self._network = torch.jit.load(str(path), map_location=device).eval()
        except RuntimeError as error:
            raise ValueError(f"{flag} {file} is not a TorchScript file: {str(error).splitlines()[0]}") from error
        self._device, self._options = device, options

    @classmethod
    def lpips(cls, file: str | Path, device: torch.device | str = "cpu") -> "ImageFeatures":
        """The network whose squared distances are LPIPS."""
        return cls(file, "--lpips_weights", device, resize_images=False, return_lpips=True)

    @classmethod
    def inception(
        cls, file: str | Path, device: torch.device | str = "cpu", flag: str = "--inception_weights"
    ) -> "ImageFeatures":
        """The network of FID."""
        require_torchmetrics()
        return cls(file, flag, device, return_features=True)

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """uint8 `[images, 3, height, width]` to float64 `[images, features]` on the CPU."""
        return self._network(pixels.to(self._device), **self._options).flatten(1).double().cpu()


def lpips_distances(network: ImageFeatures, first: Tensor, second: Tensor) -> list[float]:
    """LPIPS between the images of two batches, uint8 `[images, 3, height, width]`."""
    return (network(first) - network(second)).square().sum(dim=1).tolist()


def require_torchmetrics() -> None:
    """Raise a `ValueError` that says how to install torchmetrics if it is missing."""
    try:
        import torchmetrics.image.fid  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError(f"Fréchet distances need {error.name}: {install_command('evaluate')}") from error


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """|μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁ Σ₂)^½) of two sets of float64 features `[images, features]`.

    That is the Fréchet distance of two normal distributions (Heusel et al., 2017). It needs torchmetrics.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    features = nn.Identity()  # the network has been run
    features.num_features = torch.tensor(first.shape[1])
    distance = FrechetInceptionDistance(features)
    distance.update(first, real=True)
    distance.update(second, real=False)
    return distance.compute().item()


def to_pixels(images: Sequence[Image.Image]) -> Tensor:
    """Images of one size as uint8 `[images, 3, height, width]`."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
