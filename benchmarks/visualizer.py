"""How fast the visualizer trains and draws, compared with straightforward implementations.

    OMP_NUM_THREADS=1 python benchmarks/visualizer.py --output benchmarks/results/visualizer.json

Training: optimizer steps of projector and UNet, by `reference_steps` (float32, an optimizer for each of the two, tower
and VAE in every step, no clipping, no moving average) and by `metamorph train-visualizer` in several settings, which
clips and averages. Both read the same images from memory, crop and resize them. Drawing: the same images from the
same noise, one call for each image and guidance scale, or together. Times are CPU times of one thread, so that other
programs count little; all variants take turns, and the fastest of several times counts.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from PIL import Image
from torch import Tensor
from transformers import SiglipImageProcessorPil, SiglipVisionConfig, SiglipVisionModel, TrainerCallback

from data import machine
from metamorph.mini import asset_path
from metamorph.visualization import VisualizationPipeline, VisualizerArguments, train_visualizer
from metamorph.visualization.pixels import PixelFormat, crop_square
from metamorph.visualization.token_options import load_encoder
from metamorph.visualizer_training.build import build_projector, load_diffusion_parts
from metamorph.visualizer_training.denoising import Denoiser, RandomInputs


NUM_IMAGES = 64
ROUNDS = 2
LOGGED = 3
"""Steps between log entries, and so the steps that are timed together; the first ones are not counted."""
REFERENCE = "plain float32 loop, two optimizers"
DRAWN, SCALES, SAMPLING_STEPS = 8, (1.0, 2.0, 4.0), 10
VARIANTS: dict[str, dict[str, Any]] = {
    "float32": {},
    "float32, cached": {"cache_latents": True},
    "bf16": {"mixed_precision": "bf16"},
    "bf16, cached": {"mixed_precision": "bf16", "cache_latents": True},
}
"""Flags of `metamorph train-visualizer` in addition to those of both."""


@dataclass(frozen=True)
class Shape:
    """Sizes of everything."""

    name: str
    """Of the row."""
    batch_size: int
    """Images per step."""
    flags: dict[str, Any]
    """Flags that name the parts and their sizes."""


def main() -> None:
    """Run all parts, print tables and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks/results/visualizer.json"), help="JSON file to write"
    )
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps to time, twice (default: %(default)s)")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        shapes = [miniature(), small(Path(folder))]
        tables = {
            "training": [row for shape in shapes for row in measure_training(shape, flags.steps, Path(folder))],
            "drawing": [row for shape in shapes for row in measure_drawing(shape)],
        }
    report = {"machine": {**machine(), "diffusers": version("diffusers")}, **tables}
    flags.output.parent.mkdir(parents=True, exist_ok=True)
    flags.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report["machine"], indent=2))
    for title, rows in tables.items():
        print(f"\n{title}\n\n| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
        for row in rows:
            cells = (f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values())
            print("| " + " | ".join(cells) + " |")


def miniature() -> Shape:
    """The parts of the quickstart, 64×64 pixels."""
    flags = {
        "vision_tower": str(asset_path("mini-siglip")),
        "pretrained_model_name_or_path": str(asset_path("mini-sd")),
        "num_tokens": 16,
        "resolution": 64,
        "hidden_dim": 256,
    }
    return Shape("miniature, 64 px", 16, flags)


def small(folder: Path) -> Shape:
    """Random weights in Stable Diffusion's layout: an eighth of its width, 128×128 pixels; a tower of 256 patches."""
    torch.manual_seed(0)
    widths = (40, 80, 160, 160)
    UNet2DConditionModel(
        sample_size=16,
        block_out_channels=widths,
        cross_attention_dim=768,
        attention_head_dim=8,
        norm_num_groups=8,
    ).save_pretrained(folder / "sd" / "unet")
    AutoencoderKL(
        block_out_channels=(32, 64, 128, 128),
        layers_per_block=2,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        sample_size=128,
    ).save_pretrained(folder / "sd" / "vae")
    DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").save_pretrained(
        folder / "sd" / "scheduler"
    )
    tower = SiglipVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=224,
        patch_size=14,
    )
    SiglipVisionModel(tower).save_pretrained(folder / "tower")
    SiglipImageProcessorPil(size={"height": 224, "width": 224}).save_pretrained(folder / "tower")
    flags = {
        "vision_tower": str(folder / "tower"),
        "pretrained_model_name_or_path": str(folder / "sd"),
        "num_tokens": 64,
        "resolution": 128,
        "hidden_dim": 512,
    }
    return Shape("1/8 of Stable Diffusion's width, 128 px", 8, flags)


def make_arguments(shape: Shape, output_dir: str, **options: Any) -> VisualizerArguments:
    """The flags of a run."""
    return VisualizerArguments(
        output_dir=output_dir,
        **shape.flags,
        batch_size=shape.batch_size,
        unfreeze_unet=True,
        save_step=0,
        logging_steps=LOGGED,
        **options,
    )


def make_images(count: int = NUM_IMAGES, size: tuple[int, int] = (160, 128)) -> list[Image.Image]:
    """Images of random blocks."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (count, size[1] // 16, size[0] // 16, 3), dtype=np.uint8)
    return [Image.fromarray(image).resize(size, Image.Resampling.BICUBIC) for image in blocks]


def measure_training(shape: Shape, steps: int, folder: Path) -> list[dict[str, Any]]:
    """Samples a second of the reference and of every variant."""
    images = make_images()
    check_same_loss(shape, images)
    times: dict[str, list[float]] = {REFERENCE: [], **{f"train-visualizer, {name}": [] for name in VARIANTS}}
    for _ in range(ROUNDS):
        ticks = []
        for step, _ in zip(range(1, steps + LOGGED + 1), reference_steps(shape, images), strict=False):
            if step % LOGGED == 0:
                ticks.append(time.process_time())
        times[REFERENCE] += (np.diff(ticks) / LOGGED).tolist()
        for name, options in VARIANTS.items():
            ticks = []
            args = make_arguments(shape, str(folder / "out"), training_steps=steps + LOGGED, **options)
            train_visualizer(args, images, callbacks=[Ticks(ticks)])
            times[f"train-visualizer, {name}"] += (np.diff(ticks) / LOGGED).tolist()
    seconds = {name: min(values) for name, values in times.items()}
    reference = seconds[REFERENCE]
    return [
        {
            "shape": shape.name,
            "batch": shape.batch_size,
            "what": name,
            "ms a step": 1e3 * value,
            "samples/s": shape.batch_size / value,
            "speed-up": reference / value,
        }
        for name, value in seconds.items()
    ]


class Ticks(TrainerCallback):
    """Notes the process time at each training log entry."""

    def __init__(self, ticks: list[float]) -> None:
        self.ticks = ticks

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """Add a tick."""
        if "loss" in logs:
            self.ticks.append(time.process_time())


class Reference:
    """The parts, in float32, as a plain loop uses them."""

    def __init__(self, shape: Shape) -> None:
        args = make_arguments(shape, "unused")
        encoder = load_encoder(args)
        self.tower, self.tower_format = encoder.tower.requires_grad_(False), encoder.pixel_format
        unet, vae, self.scheduler = load_diffusion_parts(args)
        self.unet, self.vae = unet.train(), vae.requires_grad_(False)
        sizes = (encoder.config.num_image_tokens, encoder.num_features)
        self.projector = build_projector(args, sizes, self.unet.config.cross_attention_dim).train()
        self.args, self.vae_format = args, PixelFormat(args.resolution)

    def load(self, images: list[Image.Image]) -> tuple[Tensor, Tensor]:
        """Pixels for the tower and for the VAE."""
        squares = [crop_square(image) for image in images]
        return tuple(  # type: ignore[return-value]
            torch.stack([form.pixels(square) for square in squares]) for form in (self.tower_format, self.vae_format)
        )

    def loss(self, tower_pixels: Tensor, latents: Tensor, noise: Tensor, timesteps: Tensor, keep: Tensor) -> Tensor:
        """Mean squared error of the predicted noise or velocity."""
        with torch.no_grad():
            tokens = self.tower(tower_pixels)
        condition = self.projector(tokens)
        condition = torch.cat([condition, torch.zeros(len(noise), 77 - condition.shape[1], condition.shape[2])], dim=1)
        condition = condition * keep[:, None, None]
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        target = noise
        if self.scheduler.config.prediction_type == "v_prediction":
            target = self.scheduler.get_velocity(latents, noise, timesteps)
        return F.mse_loss(self.unet(noisy, timesteps, condition).sample, target)

    def latents(self, vae_pixels: Tensor) -> Tensor:
        """A sample of the VAE's distribution at the UNet's scale."""
        with torch.no_grad():
            latents = self.vae.encode(vae_pixels).latent_dist.sample()
        return (latents - (self.vae.config.shift_factor or 0.0)) * self.vae.config.scaling_factor


def reference_steps(shape: Shape, images: list[Image.Image]) -> Iterator[None]:
    """Optimizer steps of the plain loop, one each time the next is asked for."""
    reference = Reference(shape)
    optimizers = [torch.optim.AdamW(part.parameters(), lr=1e-4) for part in (reference.unet, reference.projector)]
    generator = torch.Generator().manual_seed(0)
    while True:
        chosen = torch.randint(len(images), (shape.batch_size,), generator=generator).tolist()
        tower_pixels, vae_pixels = reference.load([images[index] for index in chosen])
        latents = reference.latents(vae_pixels)
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, 1000, (len(chosen),))
        loss = reference.loss(
            tower_pixels, latents, noise, timesteps, torch.rand(len(chosen)) > reference.args.cfg_prob
        )
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        loss.item()  # as a loop that prints its loss
        yield


@torch.no_grad()
def check_same_loss(shape: Shape, images: list[Image.Image]) -> None:
    """Raise an error if the reference has another loss than the package."""
    reference = Reference(shape)
    tower_pixels, vae_pixels = reference.load(images[: shape.batch_size])
    latents = reference.latents(vae_pixels)
    random = RandomInputs.at(torch.arange(len(latents)), latents.shape[1:], seed=0, num_timesteps=1000, cfg_prob=0.3)
    plain = reference.loss(tower_pixels, latents, random.noise, random.timesteps, random.keep_condition).item()
    model = Denoiser(reference.projector, reference.unet, reference.scheduler)
    ours = model(latents, reference.tower(tower_pixels), random)["loss"].item()
    if abs(plain - ours) > 1e-4 * plain:
        raise RuntimeError(f"{shape.name}: the reference has loss {plain}, the package {ours}")


def measure_drawing(shape: Shape) -> list[dict[str, Any]]:
    """Drawings per second: one call per image and scale, per scale, or for everything."""
    reference = Reference(shape)
    pipeline = VisualizationPipeline.from_parts(
        reference.projector.eval(), reference.unet.eval(), reference.vae, reference.scheduler
    )
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        tokens = reference.tower(reference.load(make_images(DRAWN))[0])

    def draw(chosen: Tensor, first_seed: int, scales: tuple[float, ...]) -> Tensor:
        return pipeline(
            chosen,
            guidance_scale=scales,
            num_inference_steps=SAMPLING_STEPS,
            generator=[torch.Generator().manual_seed(first_seed + index) for index in range(len(chosen))],
            output_type="pt",
        ).images

    ways = {
        "one by one": lambda: torch.cat(
            [draw(tokens[index : index + 1], index, (scale,)) for index in range(DRAWN) for scale in SCALES]
        ),
        f"{DRAWN} pictures together, scale after scale": lambda: torch.stack(
            [draw(tokens, 0, (scale,)) for scale in SCALES], dim=1
        ).flatten(0, 1),
        f"{DRAWN} pictures and {len(SCALES)} scales together": lambda: draw(tokens, 0, SCALES),
    }
    draw(tokens[:1], 0, (1.0,))  # allocates
    seconds = dict.fromkeys(ways, float("inf"))
    drawn: dict[str, Tensor] = {}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            start = time.process_time()
            drawn[name] = way()
            seconds[name] = min(seconds[name], time.process_time() - start)
    return [
        {
            "shape": shape.name,
            "what": name,
            "images/s": len(drawn[name]) / seconds[name],
            "speed-up": seconds["one by one"] / seconds[name],
            "largest difference": (drawn[name] - drawn["one by one"]).abs().max().item(),
        }
        for name in ways
    ]


if __name__ == "__main__":
    main()
