"""Stand-ins for the networks of LPIPS and FID: TorchScript files that are called in the same way."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn


class Vgg(nn.Module):
    """Mean of each channel, in place of VGG16's features."""

    def forward(self, pixels: Tensor, resize_images: bool = True, return_lpips: bool = False) -> Tensor:
        if resize_images or not return_lpips:
            raise RuntimeError("other features were asked for")
        return pixels.float().mean(dim=(2, 3))


class Inception(nn.Module):
    """Two means, in place of Inception's 2048 features."""

    def forward(self, pixels: Tensor, return_features: bool = False) -> Tensor:
        if not return_features:
            raise RuntimeError("class scores were asked for")
        return pixels.float().mean(dim=(2, 3))[:, :2]


def save_networks(folder: Path) -> tuple[Path, Path]:
    """Write both; returns the files for LPIPS and for FID."""
    files = folder / "vgg.pt", folder / "inception.pt"
    for network, file in zip((Vgg(), Inception()), files, strict=True):
        torch.jit.script(network).save(file)
    return files
