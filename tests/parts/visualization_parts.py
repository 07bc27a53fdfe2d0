"""Tiny diffusion parts of the real classes, shared by the visualization tests."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from PIL import Image
from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel, TrainerCallback


CROSS_ATTENTION_DIM = 16
RESOLUTION = 32


class OnLog(TrainerCallback):
    """Calls a function with the step and the values of each training log entry."""

    def __init__(self, function: Callable[[int, dict[str, float]], object]) -> None:
        self.function = function

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" in logs:
            self.function(state.global_step, logs)


def tiny_unet(seed: int = 0) -> UNet2DConditionModel:
    """A UNet of Stable Diffusion's class on 4-channel 16×16 latents."""
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=CROSS_ATTENTION_DIM,
        attention_head_dim=4,
        norm_num_groups=4,
    )


def tiny_vae(seed: int = 0) -> AutoencoderKL:
    """A VAE that halves each side once."""
    torch.manual_seed(seed)
    return AutoencoderKL(
        sample_size=RESOLUTION,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        norm_num_groups=4,
        scaling_factor=0.7,
    )


def tiny_scheduler(prediction_type: str = "v_prediction") -> DDPMScheduler:
    """Stable Diffusion's noise schedule."""
    return DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type
    )


def write_tiny_diffusion(folder: Path, prediction_type: str = "v_prediction") -> Path:
    """Write the parts in the layout of a Stable Diffusion folder."""
    tiny_unet().save_pretrained(folder / "unet")
    tiny_vae().save_pretrained(folder / "vae")
    tiny_scheduler(prediction_type).save_pretrained(folder / "scheduler")
    return folder


def random_images(count: int, size: tuple[int, int] = (40, 32), seed: int = 0) -> list[Image.Image]:
    """Images of `(width, height)` with a coloured rectangle each."""
    rng = np.random.default_rng(seed)
    images = []
    for _ in range(count):
        pixels = np.full((size[1], size[0], 3), 230, dtype=np.uint8)
        top, left = rng.integers(0, size[1] // 2), rng.integers(0, size[0] // 2)
        pixels[top : top + size[1] // 3, left : left + size[0] // 3] = rng.integers(0, 200, 3)
        images.append(Image.fromarray(pixels))
    return images


def write_tiny_tower(folder: Path, seed: int = 0) -> Path:
    """Write a SigLIP vision tower of 4×4 patches of 24 features, with its image processor."""
    torch.manual_seed(seed)
    config = SiglipVisionConfig(
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    SiglipVisionModel(config).save_pretrained(folder)
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def tiny_flags(folder: Path, prediction_type: str = "v_prediction") -> dict[str, Any]:
    """Write a tiny tower and diffusion model; returns them and their sizes as flags of `VisualizerArguments`."""
    return {
        "vision_tower": str(write_tiny_tower(folder / "tower")),
        "pretrained_model_name_or_path": str(write_tiny_diffusion(folder / "diffusion", prediction_type)),
        "num_tokens": 4,
        "hidden_dim": 16,
        "resolution": RESOLUTION,
        "batch_size": 2,
    }


def write_archive(path: Path, members: dict[str, Image.Image | bytes]) -> Path:
    """Write a tar of images, in the format that their names end in, and of other files."""
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            if isinstance(content, Image.Image):
                buffer = io.BytesIO()
                suffix = name.rpartition(".")[2].upper()
                content.save(buffer, format="JPEG" if suffix == "JPG" else suffix)
                content = buffer.getvalue()
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_damaged_archives(folder: Path, images: list[Image.Image]) -> list[Path]:
    """Write four tars: with a corrupt JPEG as its second member, cut off within its last image, empty, and complete.

    Args:
        folder: Where; created if missing.
        images: At least 6. The first two are in the first tar, the third and (cut off) the fourth in the second, the
            others in the last.
    """
    folder.mkdir(parents=True, exist_ok=True)
    members = [("a.png", images[0]), ("broken.jpg", b"\xff\xd8 no image"), ("b.png", images[1])]
    corrupt = write_archive(folder / "0-corrupt.tar", dict(members))
    cut = write_archive(folder / "1-cut.tar", {"c.png": images[2], "d.png": images[3]})
    with tarfile.open(cut) as tar:
        end = tar.getmembers()[1].offset_data + 8
    with cut.open("r+b") as file:
        file.truncate(end)
    empty = write_archive(folder / "2-empty.tar", {})
    whole = write_archive(folder / "3-whole.tar", {f"{i}.png": image for i, image in enumerate(images[4:])})
    return [corrupt, cut, empty, whole]
