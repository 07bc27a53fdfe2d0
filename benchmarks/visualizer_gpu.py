"""The visualizer at the sizes of Stable Diffusion 1.5 on one GPU: random weights, bfloat16, compiled or not.

Run by `python benchmarks/visualizer.py --gpu`. A training step is what the trainer does on one GPU: SigLIP-SO400M (384
pixels, 64 tokens) and the VAE frozen in bfloat16, projector and UNet in float32 under autocast, clipping, an AdamW
update and the moving average, at 512 pixels; compiled means as `--torch_compile` compiles. MFU is the UNet's: FLOPs of
its forward, counted by PyTorch's FlopCounterMode, × 3 for forward and backward, / (seconds · peak); the encoders' work
is in the seconds but not in the FLOPs. Drawing takes 20 steps of DPM-Solver in bfloat16 with guidance.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from train_gpu import PEAKS

from metamorph.models.vision_tower import MetaMorphConfig, VisionTower
from metamorph.visualization.pipeline import VisualizationPipeline
from metamorph.visualization.projector import VisualizationProjector
from metamorph.visualizer_training.denoising import Denoiser, FrozenEncoders, RandomInputs, sample_latents
from metamorph.visualizer_training.fsdp2 import layers


UNET = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
"""The rest are diffusers' defaults, which are those of Stable Diffusion 1.5."""
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "sample_size": 512,
}
TOWER = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}
TRAINING = ((16, False), (16, True), (32, True))
"""Images per step, and whether the projector and the blocks of the UNet are compiled."""
DRAWING = ((1, False), (1, True), (16, False), (16, True))
"""Images per call, and whether the pipeline is compiled."""
SAMPLING_STEPS, WARMUP, STEPS = 20, 3, 10


def measure_gpu() -> dict[str, list[dict[str, Any]]]:
    """All cases, one after the other.

    Raises:
        SystemExit: if there is no GPU, or its peak is not known.
    """
    if not torch.cuda.is_available():
        sys.exit("--gpu needs a CUDA device, and there is none")
    name = torch.cuda.get_device_name()
    peak = next((value for part, value in PEAKS.items() if part in name), None)
    if peak is None:
        sys.exit(f"the peak of {name} is not known: add it to PEAKS in benchmarks/train_gpu.py")
    tables: dict[str, list[dict[str, Any]]] = {"training": [], "drawing": []}
    flops = unet_flops()
    for batch, compiled in TRAINING:
        tables["training"].append(
            guarded(lambda b=batch, c=compiled: training_case(b, c, flops, peak), batch, compiled)
        )
    for batch, compiled in DRAWING:
        tables["drawing"].append(guarded(lambda b=batch, c=compiled: drawing_case(b, c), batch, compiled))
    return {title: [{"GPU": name, **row} for row in rows] for title, rows in tables.items()}


def guarded(measure: Callable[[], dict[str, Any]], batch: int, compiled: bool) -> dict[str, Any]:
    """A row, also of a case that does not fit."""
    try:
        return {"pictures": batch, "compiled": compiled, **measure()}
    except torch.OutOfMemoryError:
        return {"pictures": batch, "compiled": compiled, "result": "out of memory"}
    finally:
        torch.cuda.empty_cache()


def unet_flops() -> float:
    """FLOPs of the UNet's forward for one image of 512×512 pixels and 77 condition tokens."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNET)
        latents, condition = torch.empty(1, 4, 64, 64), torch.empty(1, 77, 768)
        timestep = torch.zeros(1, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(latents, timestep, condition)
    return float(counter.get_total_flops())


def build(device: str = "cuda") -> tuple[Denoiser, FrozenEncoders]:
    """Random weights."""
    torch.manual_seed(0)
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    with torch.device(device):
        tower = VisionTower(MetaMorphConfig(vision_config=dict(TOWER), num_image_tokens=64)).bfloat16()
        vae = AutoencoderKL(**VAE).bfloat16()
        model = Denoiser(VisualizationProjector(mode="mlp"), UNet2DConditionModel(**UNET), scheduler)
    return model, FrozenEncoders(tower, vae)


def training_case(batch: int, compiled: bool, flops: float, peak: float) -> dict[str, Any]:
    """Images a second and MFU of the training step."""
    model, encoders = build()
    if compiled:
        for layer in layers(model):
            layer.compile()
    weights = list(model.parameters())
    optimizer = torch.optim.AdamW(weights, lr=1e-5)
    average = EMAModel(weights, decay=0.9999)
    pixels = {
        "tower_pixels": torch.randn(batch, 3, 384, 384, device="cuda"),
        "vae_pixels": torch.randn(batch, 3, 512, 512, device="cuda"),
    }

    def step(number: int) -> None:
        encoded = encoders(**pixels)
        positions = torch.arange(number * batch, (number + 1) * batch)
        random = RandomInputs.at(positions, (4, 64, 64), seed=0, num_timesteps=1000, cfg_prob=0.1)
        random = RandomInputs(**{name: value.cuda() for name, value in vars(random).items()})
        latents = sample_latents(encoders.vae, encoded["moments"], random.latent_noise)
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(latents, encoded["visual_tokens"], random)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.step(weights)

    torch.cuda.reset_peak_memory_stats()
    seconds = time_calls(step)
    return {
        "ms a step": 1e3 * seconds,
        "images/s": batch / seconds,
        "MFU of the UNet %": 100 * 3 * flops * batch / seconds / peak,
        "peak GB": torch.cuda.max_memory_allocated() / 1e9,
    }


def drawing_case(batch: int, compiled: bool) -> dict[str, Any]:
    """Seconds an image."""
    model, encoders = build()
    scheduler = model.noise_scheduler
    parts = (model.projector.bfloat16().eval(), model.unet.bfloat16().eval(), encoders.vae)
    pipeline = VisualizationPipeline.from_parts(*parts, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    if compiled:
        pipeline.compile()
    tokens: Tensor = torch.randn(batch, 64, 1152, device="cuda")
    generators = [torch.Generator().manual_seed(seed) for seed in range(batch)]
    torch.cuda.reset_peak_memory_stats()
    seconds = time_calls(
        lambda number: pipeline(
            tokens,
            guidance_scale=3.0,
            num_inference_steps=SAMPLING_STEPS,
            generator=generators,
            output_type="pt",
        ),
        steps=3,
    )
    return {"s an image": seconds / batch, "peak GB": torch.cuda.max_memory_allocated() / 1e9}


def time_calls(call: Callable[[int], Any], steps: int = STEPS) -> float:
    """Seconds of a call, the mean over `steps`, after some that do not count."""
    for number in range(WARMUP):
        call(number)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for number in range(steps):
        call(number)
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / steps
