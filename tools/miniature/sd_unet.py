"""The miniature's denoiser: Stable Diffusion's UNet at 16×16×4 latents, conditioned by cross-attention alone.

Stable Diffusion is pretrained on text. This one is pretrained on a scene's attributes, written as one token per cell
of the 4×4 grid of visual tokens: the same number, order and meaning of tokens that a projector of visual tokens can
give, so that fitting it to a vision tower later only has to learn that projector.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, DPMSolverMultistepScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor, nn

from metamorph.files.permissions import save_file
from metamorph.miniature.quickstart.conditions import CONDITION_DIM, AttributeEncoder, background_labels
from metamorph.miniature.world.cells import cell_labels
from metamorph.miniature.world.checker import judge
from metamorph.miniature.world.scenes import is_reserved, sample_scene, single_scenes
from metamorph.visualization.pipeline import from_unet_latents, to_unet_latents
from metamorph.visualization.projector import pad_condition
from tools.miniature.sd_vae import Ema, accuracy, encode_scenes, to_images
from tools.miniature.training_state import TrainingSchedule, step_rng, train


logger = logging.getLogger(__name__)

GUIDANCE_SCALE = 2.0
SAMPLING_STEPS = 15

_TRAIN_STREAM, _EVALUATION_STREAM, _BANK_STREAM = 20, 21, 22


@dataclass(frozen=True)
class UnetRecipe:
    """Hyper-parameters of the UNet and its attribute encoder."""

    steps: int = 3500
    """Optimizer steps."""
    batch_size: int = 16
    """Latents in a step, half of them of one object and half of two."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW."""
    condition_dropout: float = 0.1
    """Share of samples whose whole condition is zeroed, for classifier-free guidance."""
    condition_noise: float = 0.1
    """Standard deviation of noise on conditions, whose own is 1: a projector will not hit them exactly either."""
    timestep_power: float = 0.6
    """Timesteps are 1000·u^power: more at high noise, where the image is laid out from the condition alone."""
    pair_scenes: int = 6000
    """Scenes of two objects whose latents are precomputed, beside every scene of one object."""
    ema_decay: float = 0.999
    """Decay of the averaged weights, which are the ones that ship."""
    evaluate_every: int = 500
    """Steps between two snapshots and readings of the checker."""
    snapshot_scenes: int = 32
    """Scenes of one object, and as many of two, that are drawn for every reading."""


def new_unet() -> UNet2DConditionModel:
    """An untrained UNet of 3.9 M parameters.

    Of its levels of 16², 8² and 4² latents only the last has attention: there a query stands for one cell of the
    condition's grid, and zero-padded convolutions tell it which. Attention at 8² too makes a step 1.6 times as slow.
    """
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64, 128),
        layers_per_block=1,
        cross_attention_dim=CONDITION_DIM,
        attention_head_dim=4,  # diffusers reads this as the number of heads
        norm_num_groups=8,
    )


def new_noise_scheduler() -> DDPMScheduler:
    """Stable Diffusion's noise schedule, with v-prediction."""
    return DDPMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        timestep_spacing="trailing",
    )


class LatentBank:
    """Latents of training scenes, encoded once: every reachable single scene and a fixed draw of pairs."""

    def __init__(self, vae: AutoencoderKL, seed: int, pair_scenes: int) -> None:
        rng = step_rng(seed, _BANK_STREAM, 0)
        singles = [scene for scene in single_scenes() if not is_reserved(scene)]
        scenes = singles + [sample_scene(rng, num_objects=2) for _ in range(pair_scenes)]
        self.num_singles = len(singles)
        self.latents = to_unet_latents(vae, encode_scenes(vae, scenes))
        self.labels = cell_labels(scenes)
        self.backgrounds = background_labels(scenes)

    def draw(self, generator: torch.Generator, count: int) -> Tensor:
        """Indices of `count` scenes, half of them singles, ``[count]``."""
        singles = torch.randint(self.num_singles, (count - count // 2,), generator=generator)
        pairs = torch.randint(self.num_singles, len(self.labels), (count // 2,), generator=generator)
        return torch.cat([singles, pairs])


@torch.no_grad()
def sample_images(
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
    noise_scheduler: DDPMScheduler,
    conditions: Tensor,
    seed: int,
    *,
    guidance_scale: float = GUIDANCE_SCALE,
    num_inference_steps: int = SAMPLING_STEPS,
) -> list:
    """Draw images for conditions ``[images, 16, dim]`` as the pipeline does; arrays ``[64, 64, 3]`` uint8."""
    scheduler = DPMSolverMultistepScheduler.from_config(noise_scheduler.config)
    scheduler.set_timesteps(num_inference_steps)
    size = unet.config.sample_size
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(len(conditions), unet.config.in_channels, size, size, generator=generator)
    padded = pad_condition(conditions)
    both = torch.cat([torch.zeros_like(padded), padded])
    for timestep in scheduler.timesteps:
        without, wanted = unet(torch.cat([latents, latents]), timestep, both).sample.chunk(2)
        latents = scheduler.step(without + guidance_scale * (wanted - without), timestep, latents).prev_sample
    return to_images(vae.decode(from_unet_latents(vae, latents)).sample)


def evaluate_unet(
    unet: UNet2DConditionModel, vae: AutoencoderKL, encoder: AttributeEncoder, seed: int, count: int
) -> dict[str, dict[str, float]]:
    """Checker accuracy of images drawn from the attributes of `count` reserved singles and as many pairs.

    Returns:
        ``{"singles": {"color", "shape", "size", "position", "all"}, "pairs": {…}}``.
    """
    figures = {}
    noise_scheduler = new_noise_scheduler()
    for name, num_objects in (("singles", 1), ("pairs", 2)):
        rng = step_rng(seed, _EVALUATION_STREAM, num_objects)
        scenes = [sample_scene(rng, num_objects=num_objects, reserved=True) for _ in range(count)]
        verdicts = []
        for start in range(0, count, 32):
            part = scenes[start : start + 32]
            with torch.no_grad():
                conditions = encoder.encode(part)
            images = sample_images(unet, vae, noise_scheduler, conditions, seed + start)
            verdicts += [judge(image, scene) for image, scene in zip(images, part, strict=True)]
        figures[name] = accuracy(verdicts)
    return figures


def save_snapshot(folder: Path, model: nn.ModuleDict, facts: dict) -> None:
    """Save UNet, attribute encoder and facts about them, replacing an older snapshot."""
    unet: Any = model["unet"]
    unet.save_pretrained(folder / "unet")
    save_file(model["encoder"].state_dict(), folder / "condition_encoder.safetensors")
    (folder / "facts.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def load_snapshot(folder: Path) -> tuple[UNet2DConditionModel, AttributeEncoder, dict]:
    """Inverse of :func:`save_snapshot`."""
    encoder = AttributeEncoder()
    encoder.load_state_dict(load_file(folder / "condition_encoder.safetensors"))
    facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    return UNet2DConditionModel.from_pretrained(folder / "unet").eval(), encoder.eval(), facts


def train_unet(vae: AutoencoderKL, seed: int, folder: Path, recipe: UnetRecipe, *, resume: bool = True) -> None:
    """Train UNet and attribute encoder; ``folder/snapshot`` always holds the newest averaged weights.

    Args:
        vae: the finished autoencoder.
        seed: of weights and data.
        folder: where the resumable state and the snapshot are kept.
        recipe: hyper-parameters.
        resume: whether to continue from the state found there.
    """
    torch.manual_seed(seed)
    model = nn.ModuleDict({"unet": new_unet(), "encoder": AttributeEncoder()})
    ema = Ema(model, recipe.ema_decay)
    average: Any = ema.average  # a module dictionary like `model`
    bank = LatentBank(vae, seed, recipe.pair_scenes)
    logger.info("UNet: %d scenes encoded, latent std %.3f", len(bank.latents), bank.latents.std().item())

    def snapshot(step: int, seconds: float = 0.0) -> None:
        figures = evaluate_unet(average["unet"], vae, average["encoder"], seed, recipe.snapshot_scenes)
        logger.info("UNet after %d steps: %s", step, figures)
        save_snapshot(folder / "snapshot", average, {"steps": step, "figures": figures, "seconds": seconds})

    def loss_of_step(step: int) -> tuple[Tensor, dict[str, float]]:
        ema.update(step)
        if step and step % recipe.evaluate_every == 0:
            snapshot(step)
        generator = torch.Generator().manual_seed(int(step_rng(seed, _TRAIN_STREAM, step).integers(2**62)))
        return _denoising_loss(model, bank, recipe, generator)

    modules = nn.ModuleDict({"model": model, "average": ema.average})
    schedule = TrainingSchedule(recipe.steps, recipe.learning_rate, warmup_steps=100, save_every=250, log_every=100)
    fingerprint = f"mini-sd UNet, seed {seed}, {recipe}"
    seconds = train(modules, schedule, loss_of_step, folder / "training", fingerprint=fingerprint, resume=resume)
    ema.update(recipe.steps)
    snapshot(recipe.steps, seconds)


def _denoising_loss(
    model: nn.ModuleDict, bank: LatentBank, recipe: UnetRecipe, generator: torch.Generator
) -> tuple[Tensor, dict[str, float]]:
    """Mean squared error on v, and the part of it at high noise."""
    noise_scheduler = new_noise_scheduler()
    size = recipe.batch_size
    chosen = bank.draw(generator, size)
    conditions = model["encoder"](bank.labels[chosen], bank.backgrounds[chosen])
    conditions = conditions + recipe.condition_noise * torch.randn(conditions.shape, generator=generator)
    kept = torch.rand(size, 1, 1, generator=generator) >= recipe.condition_dropout
    latents = bank.latents[chosen]
    noise = torch.randn(latents.shape, generator=generator)
    timesteps = (1000 * torch.rand(size, generator=generator) ** recipe.timestep_power).long()
    noisy = noise_scheduler.add_noise(latents, noise, timesteps)
    predicted = model["unet"](noisy, timesteps, pad_condition(conditions * kept)).sample
    target = noise_scheduler.get_velocity(latents, noise, timesteps)
    errors = (predicted - target).square().mean(dim=(1, 2, 3))
    high = errors[timesteps >= 800].detach()
    return errors.mean(), {"high_noise": high.mean().item() if len(high) else float("nan")}
