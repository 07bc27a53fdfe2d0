"""The miniature's autoencoder: 64×64 images to 16×16×4 latents and back, as in Stable Diffusion but with f=4."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F

from metamorph.miniature.world.checker import Verdict, judge
from metamorph.miniature.world.render import IMAGE_SIZE, render_array
from metamorph.miniature.world.scenes import Scene, sample_scene
from tools.miniature.training_state import TrainingSchedule, step_rng, train


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class VaeRecipe:
    """Hyper-parameters of the autoencoder."""

    steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 16
    """Images in a step, half of them of two objects."""
    learning_rate: float = 2e-3
    """Peak learning rate of AdamW."""
    kl_weight: float = 2e-4
    """Weight of the mean KL divergence per latent element; enough to keep the latents bounded and smooth."""
    ema_decay: float = 0.998
    """Decay of the averaged weights, which are the ones that ship."""
    evaluate_every: int = 200
    """Steps between two readings of the checker, on 100 scenes of each kind."""


_TRAIN_STREAM, _EVALUATION_STREAM, _SCALE_STREAM = 10, 11, 12


class Ema:
    """Exponential moving average of a module's parameters, held in a frozen copy of the module.

    The decay warms up as (1 + n) / (10 + n), so that the average forgets the random start.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.source = module
        self.average = copy.deepcopy(module).requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the weights as they are after `step` optimizer steps."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.source.parameters()), weight)


def new_vae() -> AutoencoderKL:
    """An untrained autoencoder of 0.68 M parameters, Stable Diffusion's classes at a sixteenth of the width."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
    )


def to_pixels(images: Sequence[np.ndarray]) -> Tensor:
    """Images ``[64, 64, 3]`` uint8 to a batch ``[images, 3, 64, 64]`` in -1..1."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1).contiguous()


def to_images(pixels: Tensor) -> list[np.ndarray]:
    """Inverse of :func:`to_pixels`, clipped."""
    scaled = pixels.float().clamp(-1, 1).add(1).mul(127.5).round()
    return list(scaled.permute(0, 2, 3, 1).to(torch.uint8).cpu().numpy())


def accuracy(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Share of right verdicts by attribute: ``{"color", "shape", "size", "position", "all"}``."""
    names = ("color", "shape", "size", "position", "all")
    return {name: sum(getattr(verdict, name) for verdict in verdicts) / len(verdicts) for name in names}


@torch.no_grad()
def evaluate_vae(vae: AutoencoderKL, seed: int, count: int) -> dict[str, float]:
    """Checker accuracy on reconstructions of evaluation scenes, and the mean absolute error of 255.

    Returns:
        ``{"singles": share right in all, "pairs": …, "mean_absolute_error": …}``.
    """
    figures: dict[str, float] = {}
    errors = []
    for name, num_objects in (("singles", 1), ("pairs", 2)):
        rng = step_rng(seed, _EVALUATION_STREAM, num_objects)
        scenes = [sample_scene(rng, num_objects=num_objects, reserved=True) for _ in range(count)]
        originals = [render_array(scene, rng) for scene in scenes]
        verdicts = []
        for start in range(0, count, 50):
            pixels = to_pixels(originals[start : start + 50])
            rebuilt = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
            errors.append((rebuilt.clamp(-1, 1) - pixels).abs().mean().item() * 127.5)
            pairs = zip(to_images(rebuilt), scenes[start : start + 50], strict=True)
            verdicts += [judge(image, scene) for image, scene in pairs]
        figures[name] = accuracy(verdicts)["all"]
    figures["mean_absolute_error"] = float(np.mean(errors))
    return figures


@torch.no_grad()
def encode_scenes(vae: AutoencoderKL, scenes: Sequence[Scene]) -> Tensor:
    """Latent modes of exact drawings, not scaled, ``[scenes, 4, 16, 16]``."""
    parts = []
    for start in range(0, len(scenes), 64):
        pixels = to_pixels([render_array(scene) for scene in scenes[start : start + 64]])
        parts.append(vae.encode(pixels).latent_dist.mode())
    return torch.cat(parts)


def set_latent_scale(vae: AutoencoderKL, seed: int) -> None:
    """Set `vae`'s ``shift_factor`` and ``scaling_factor`` such that latents have mean 0 and standard deviation 1."""
    rng = step_rng(seed, _SCALE_STREAM, 0)
    latents = encode_scenes(vae, [sample_scene(rng) for _ in range(256)])
    vae.register_to_config(
        scaling_factor=round(1 / latents.std().item(), 5), shift_factor=round(latents.mean().item(), 5)
    )


def train_vae(seed: int, state_folder: Path, recipe: VaeRecipe, *, resume: bool = True) -> tuple[AutoencoderKL, float]:
    """Train the autoencoder and set the scale of its latents.

    Args:
        seed: of weights and data.
        state_folder: where the resumable state is kept.
        recipe: hyper-parameters.
        resume: whether to continue from that state.

    Returns:
        The averaged model in float32, and the seconds it took.
    """
    torch.manual_seed(seed)
    vae = new_vae()
    ema = Ema(vae, recipe.ema_decay)

    def loss_of_step(step: int) -> tuple[Tensor, dict[str, float]]:
        ema.update(step)
        if step and step % recipe.evaluate_every == 0:
            logger.info("VAE after %d steps: %s", step, evaluate_vae(ema.average, seed, count=100))
        rng = step_rng(seed, _TRAIN_STREAM, step)
        scenes = [sample_scene(rng, pair_fraction=0.5) for _ in range(recipe.batch_size)]
        pixels = to_pixels([render_array(scene, rng) for scene in scenes])
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(pixels).latent_dist
            rebuilt = vae.decode(posterior.sample(generator)).sample
        rebuilt = rebuilt.float()
        divergence = posterior.kl().float().mean() / posterior.mean[0].numel()
        loss = F.l1_loss(rebuilt, pixels) + F.mse_loss(rebuilt, pixels) + recipe.kl_weight * divergence
        return loss, {"kl": divergence.item()}

    modules = nn.ModuleDict({"model": vae, "average": ema.average})
    schedule = TrainingSchedule(recipe.steps, recipe.learning_rate, warmup_steps=50, weight_decay=0.0)
    fingerprint = f"mini-sd VAE, seed {seed}, {recipe}"
    seconds = train(modules, schedule, loss_of_step, state_folder, fingerprint=fingerprint, resume=resume)
    ema.update(recipe.steps)
    average = ema.average.eval()
    set_latent_scale(average, seed)
    return average, seconds
