"""One training step of the visualizer: encode, add noise, predict it from the visual tokens, compare."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.training_utils import compute_snr
from torch import nn
from torch.nn import functional as F

from metamorph.visualization.guidance import drop
from metamorph.visualization.pipeline import to_unet_latents
from metamorph.visualization.projector import VisualizationProjector, pad_condition


class FrozenEncoders:
    """The vision tower (pixels to visual tokens) and the VAE, which are never trained."""

    def __init__(self, tower: nn.Module, vae: AutoencoderKL) -> None:
        self.tower: Any = tower.requires_grad_(False).eval()
        # The fastest layout for convolutions: a third less time on a CPU.
        self.vae = vae.requires_grad_(False).eval().to(memory_format=torch.channels_last)

    @torch.no_grad()
    def __call__(self, tower_pixels: torch.Tensor, vae_pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Encode images, given as the tower `[images, 3, S, S]` and the VAE `[images, 3, R, R]` take them, in float32.

        Returns `visual_tokens [images, N, D]`, and `moments [images, 2 · channels, height, width]`: mean and logarithm
        of the variance of the latents, which are sampled from them in every step.
        """
        with torch.inference_mode():
            moments = self.vae.encode(vae_pixels.to(self.vae.device, self.vae.dtype)).latent_dist.parameters
        # Autograd cannot save tensors made in inference mode, so copy them; the tower does so itself.
        return {
            "visual_tokens": self.tower(tower_pixels.to(self.vae.device)).float(),
            "moments": moments.clone().float(),
        }


@dataclass(frozen=True)
class RandomInputs:
    """Everything random about a batch."""

    noise: torch.Tensor
    """`[images, channels, height, width]`, normal: added to the latents."""
    latent_noise: torch.Tensor
    """`[images, channels, height, width]`, normal: samples the latents from the VAE's distribution."""
    timesteps: torch.Tensor
    """`[images]` long: how much noise is added."""
    keep_condition: torch.Tensor
    """`[images]` bool: False for samples whose condition is dropped."""

    @classmethod
    def at(
        cls,
        positions: torch.Tensor,
        latent_shape: tuple[int, ...],
        *,
        seed: int,
        num_timesteps: int,
        timestep_power: float = 1.0,
        cfg_prob: float = 0.0,
        noise_offset: float = 0.0,
    ) -> "RandomInputs":
        """The random inputs of the samples at `positions` `[images]` of the training stream.

        They do not depend on the batch size, accumulation, number of processes, or on interruptions. `latent_shape` is
        `(channels, height, width)`; other options are those of [`VisualizerArguments`].
        """
        noise, latent_noise, timesteps, keep = [], [], [], []
        for position in positions.tolist():
            # One generator per sample. SeedSequence mixes both numbers: neighbours must not share a stream.
            state = np.random.SeedSequence([seed, position]).generate_state(1)
            generator = torch.Generator().manual_seed(int(state[0]))
            # The order of these calls decides the numbers; runs that resume rely on it.
            offset = noise_offset * torch.randn(latent_shape[0], 1, 1, generator=generator)
            noise.append(torch.randn(latent_shape, generator=generator) + offset)
            latent_noise.append(torch.randn(latent_shape, generator=generator))
            uniform = torch.rand((), dtype=torch.float64, generator=generator)
            timesteps.append((num_timesteps * uniform**timestep_power).long())
            keep.append(torch.rand((), generator=generator) >= cfg_prob)
        return cls(torch.stack(noise), torch.stack(latent_noise), torch.stack(timesteps), torch.stack(keep))


def sample_latents(vae: AutoencoderKL, moments: torch.Tensor, latent_noise: torch.Tensor) -> torch.Tensor:
    """Sample latents at the UNet's scale, `[images, channels, height, width]`, from `moments` with given noise."""
    distribution = DiagonalGaussianDistribution(moments)
    return to_unet_latents(vae, distribution.mean + distribution.std * latent_noise)


class Denoiser(nn.Module):
    """Projector and UNet as the one module that is trained; its forward pass returns the loss, as Trainer expects.

    The prediction type of `noise_scheduler` is `epsilon` or `v_prediction`. With `snr_gamma`, images are weighted by
    min(SNR, gamma)/SNR (Hang et al., 2023), /(SNR + 1) for v-prediction.
    """

    def __init__(
        self,
        projector: VisualizationProjector,
        unet: UNet2DConditionModel,
        noise_scheduler: DDPMScheduler,
        snr_gamma: float | None = None,
    ) -> None:
        super().__init__()
        self.projector = projector
        self.unet = unet
        self.noise_scheduler = noise_scheduler
        self.snr_gamma = snr_gamma

    def predict(
        self,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        visual_tokens: torch.Tensor,
        keep_condition: torch.Tensor,
    ) -> torch.Tensor:
        """Predict the scheduler's target `[images, channels, height, width]` from noisy latents of that shape."""
        condition = pad_condition(self.projector(visual_tokens))  # (images, >= 77, cross_attention_dim)
        # After padding, so that a dropped condition is the all-zero one that the pipeline guides with.
        condition = drop(condition, keep_condition)
        return self.unet(noisy_latents, timesteps, encoder_hidden_states=condition).sample

    def forward(
        self,
        latents: torch.Tensor,
        visual_tokens: torch.Tensor,
        random: RandomInputs,
        weights: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Mean squared error on the scheduler's own target, averaged over images, as `{"loss": []}`.

        `latents` `[images, channels, height, width]` are at the UNet's scale; `weights` `[images]` are 0 for images
        that are left out, else 1.
        """
        scheduler, noise, timesteps = self.noise_scheduler, random.noise, random.timesteps
        noisy = scheduler.add_noise(latents, noise, timesteps)
        predicts_velocity = scheduler.config.prediction_type == "v_prediction"
        target = scheduler.get_velocity(latents, noise, timesteps) if predicts_velocity else noise
        prediction = self.predict(noisy, timesteps, visual_tokens, random.keep_condition)
        # In float32, also under bf16 autocast.
        losses = F.mse_loss(prediction.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))  # (images,)
        if self.snr_gamma is not None:
            snr = compute_snr(scheduler, timesteps)
            losses = losses * snr.clamp(max=self.snr_gamma) / (snr + 1 if predicts_velocity else snr)
        if weights is not None:
            losses = losses * weights
        # Divided by all images, also those left out: the gradient of a batch then is the sum of those of its parts,
        # however it is split into micro-batches and among processes.
        return {"loss": losses.mean()}

    def gradient_checkpointing_enable(self, **_: Any) -> None:
        """Recompute the UNet's activations; Trainer calls it with `--gradient_checkpointing`."""
        self.unet.enable_gradient_checkpointing()

    activation_checkpointing_enable = gradient_checkpointing_enable  # its name from Transformers 5.23 on
