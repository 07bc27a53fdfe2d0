"""The visualizer at the sizes of Stable Diffusion 1.5 on one GPU: random weights, bfloat16, compiled or not.

`make gpu` runs it, see `gpu.py`. A training step is what the trainer does on one GPU: SigLIP-SO400M (384
pixels, 64 tokens) and the VAE frozen in bfloat16, projector and UNet in float32 under autocast, clipping, an AdamW
update and the moving average, at 512 pixels; compiled means as `--torch_compile` compiles. MFU is the UNet's: FLOPs of
its forward, counted by PyTorch's FlopCounterMode, × 3 for forward and backward, / (seconds · peak); the encoders' work
is in the seconds but not in the FLOPs. Drawing takes 20 steps of DPM-Solver in bfloat16 with guidance.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from train_gpu import DEVICE, SMALL_TOWER, TOWER, device_peak, peak_gigabytes, time_calls

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
SMALL_UNET = {
    "sample_size": 8,
    "block_out_channels": (32, 32),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 32,
    "norm_num_groups": 8,
}
SMALL_VAE = {"block_out_channels": (16, 16, 16, 16), "norm_num_groups": 8}
TRAINING = ((16, False), (16, True), (32, True))
"""Images per step, and whether the projector and the blocks of the UNet are compiled."""
DRAWING = ((1, False), (1, True), (16, False), (16, True))
"""Images per call, and whether the pipeline is compiled."""
SAMPLING_STEPS = 20


def unet_flops() -> float:
    """FLOPs of the UNet's forward for one image of 512×512 pixels and 77 condition tokens."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNET)
        latents, condition = torch.empty(1, 4, 64, 64), torch.empty(1, 77, 768)
        timestep = torch.zeros(1, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(latents, timestep, condition)
    return float(counter.get_total_flops())


def build(small: bool) -> tuple[Denoiser, FrozenEncoders]:
    """Random weights."""
    torch.manual_seed(0)
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    tower_config = TOWER | (SMALL_TOWER if small else {})
    unet_config = UNET | (SMALL_UNET if small else {})
    with torch.device(DEVICE):
        tower = VisionTower(MetaMorphConfig(vision_config=tower_config, num_image_tokens=64)).bfloat16()
        vae = AutoencoderKL(**(VAE | (SMALL_VAE if small else {}))).bfloat16()
        projector = VisualizationProjector(tower_config["hidden_size"], output_dim=unet_config["cross_attention_dim"])
        model = Denoiser(projector, UNet2DConditionModel(**unet_config), scheduler)
    return model, FrozenEncoders(tower, vae)


def training_case(batch: int, compiled: bool, *, small: bool = False) -> dict[str, Any]:
    """Images a second and MFU of the training step."""
    (model, encoders), side = build(small), 64 if small else 512
    model.unet.to(memory_format=torch.channels_last)
    if compiled:
        for layer in layers(model):
            layer.compile()
    weights = list(model.parameters())
    optimizer = torch.optim.AdamW(weights, lr=1e-5, fused=True)
    average = EMAModel(weights, decay=0.9999, foreach=True)
    pixels = {
        "tower_pixels": torch.randn(batch, 3, 384, 384, device=DEVICE),
        "vae_pixels": torch.randn(batch, 3, side, side, device=DEVICE),
    }

    def step(number: int) -> None:
        encoded = encoders(**pixels)
        positions = torch.arange(number * batch, (number + 1) * batch)
        random = RandomInputs.at(positions, (4, side // 8, side // 8), seed=0, num_timesteps=1000, cfg_prob=0.1)
        random = RandomInputs(**{name: value.to(DEVICE) for name, value in vars(random).items()})
        latents = sample_latents(encoders.vae, encoded["moments"], random.latent_noise)
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = model(latents, encoded["visual_tokens"], random)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.step(weights)

    seconds = time_calls(step)
    return {
        "images": batch,
        "compiled": compiled,
        "ms a step": 1e3 * seconds,
        "images/s": batch / seconds,
        "MFU of the UNet %": 100 * 3 * unet_flops() * batch / seconds / device_peak(),
        "peak GB": peak_gigabytes(),
    }


def drawing_case(batch: int, compiled: bool, *, small: bool = False) -> dict[str, Any]:
    """Seconds an image."""
    model, encoders = build(small)
    scheduler = model.noise_scheduler
    parts = (model.projector.bfloat16().eval(), model.unet.bfloat16().eval(), encoders.vae)
    pipeline = VisualizationPipeline.from_parts(*parts, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    if compiled:
        pipeline.compile()
    tokens: Tensor = torch.randn(batch, 64, model.projector.config.input_dim, device=DEVICE)
    generators = [torch.Generator().manual_seed(seed) for seed in range(batch)]
    seconds = time_calls(
        lambda number: pipeline(
            tokens,
            guidance_scale=3.0,
            num_inference_steps=2 if small else SAMPLING_STEPS,
            generator=generators,
            output_type="pt",
        ),
        steps=3,
    )
    row = {"images": batch, "compiled": compiled, "s an image": seconds / batch}
    return {**row, "peak GB": peak_gigabytes()}
