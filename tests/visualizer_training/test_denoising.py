"""One training step of the visualizer: targets, dropped conditions, reproducible noise."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import nn
from visualization_parts import CROSS_ATTENTION_DIM, tiny_scheduler, tiny_unet, tiny_vae

from metamorph.visualization.projector import VisualizationProjector, pad_condition
from metamorph.visualizer_training.average import MovingAverage
from metamorph.visualizer_training.denoising import Denoiser, RandomInputs, sample_latents


LATENT_SHAPE = (4, 16, 16)


def random_at(*positions: int, **options) -> RandomInputs:
    defaults = {"seed": 0, "num_timesteps": 1000, "cfg_prob": 0.5, "noise_offset": 0.0}
    return RandomInputs.at(torch.tensor(positions), LATENT_SHAPE, **(defaults | options))


@pytest.fixture
def model() -> Denoiser:
    torch.manual_seed(0)
    projector = VisualizationProjector(input_dim=12, hidden_dim=16, output_dim=CROSS_ATTENTION_DIM, mode="mlp")
    return Denoiser(projector, tiny_unet(), tiny_scheduler())


class Oracle(nn.Module):
    """Knows clean latents and noise, and predicts what a v-prediction or epsilon scheduler asks for."""

    def __init__(self, scheduler, latents: torch.Tensor, noise: torch.Tensor) -> None:
        super().__init__()
        self.scheduler, self.latents, self.noise = scheduler, latents, noise

    def forward(self, noisy, timesteps, encoder_hidden_states) -> UNet2DConditionOutput:
        alpha = self.scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        signal, level = alpha.sqrt(), (1 - alpha).sqrt()
        torch.testing.assert_close(noisy, signal * self.latents + level * self.noise)
        if self.scheduler.config.prediction_type == "epsilon":
            return UNet2DConditionOutput(self.noise)
        return UNet2DConditionOutput(signal * self.noise - level * self.latents)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("snr_gamma", [None, 5.0])
def test_target_is_the_schedulers_own(prediction_type, snr_gamma):
    scheduler = tiny_scheduler(prediction_type)
    latents, random = torch.randn(3, *LATENT_SHAPE), random_at(0, 1, 2)
    model = Denoiser(nn.Identity(), Oracle(scheduler, latents, random.noise), scheduler, snr_gamma)
    loss = model(latents, torch.zeros(3, 4, 12), random)["loss"]
    assert loss.item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weights(prediction_type, model):
    scheduler, latents, tokens = tiny_scheduler(prediction_type), torch.randn(1, *LATENT_SHAPE), torch.randn(1, 4, 12)
    random = random_at(0)
    model.noise_scheduler = scheduler
    plain = model(latents, tokens, random)["loss"]
    model.snr_gamma = 0.5
    weighted = model(latents, tokens, random)["loss"]
    alpha = scheduler.alphas_cumprod[random.timesteps]
    snr = (alpha / (1 - alpha)).item()
    divisor = snr if prediction_type == "epsilon" else snr + 1
    assert weighted.item() == pytest.approx(plain.item() * min(snr, 0.5) / divisor, rel=1e-5)


def test_dropped_sample_is_the_pipelines_zero_condition(model):
    noisy, timesteps, tokens = torch.randn(2, *LATENT_SHAPE), torch.tensor([10, 900]), torch.randn(2, 4, 12)
    with torch.no_grad():
        mixed = model.predict(noisy, timesteps, tokens, torch.tensor([True, False]))
        condition = pad_condition(model.projector(tokens))
        kept = model.unet(noisy, timesteps, condition).sample
        dropped = model.unet(noisy, timesteps, torch.zeros_like(condition)).sample
    torch.testing.assert_close(mixed[0], kept[0])
    torch.testing.assert_close(mixed[1], dropped[1])
    assert not torch.allclose(kept[1], dropped[1])


def test_dropped_samples_give_the_projector_no_gradient(model):
    def gradient(keep: list[bool]) -> float:
        model.zero_grad()
        tokens, latents = torch.ones(2, 4, 12), torch.ones(2, *LATENT_SHAPE)
        random = replace(random_at(0, 1), keep_condition=torch.tensor(keep))
        model(latents, tokens, random)["loss"].backward()
        return sum(p.grad.abs().sum().item() for p in model.projector.parameters())

    assert gradient([False, False]) == 0
    assert gradient([True, False]) > 0


def test_random_inputs_depend_on_position_only():
    together, alone = random_at(3, 8), random_at(8)
    for name in ("noise", "latent_noise", "timesteps", "keep_condition"):
        assert torch.equal(getattr(together, name)[1:], getattr(alone, name))
    assert not torch.equal(together.noise[0], together.noise[1])
    assert not torch.equal(together.noise[0], together.latent_noise[0])
    assert not torch.equal(alone.noise, random_at(8, seed=1).noise)


@pytest.mark.parametrize("cfg_prob", [0.0, 0.3])
def test_share_of_dropped_conditions(cfg_prob):
    keep = random_at(*range(2000), cfg_prob=cfg_prob).keep_condition
    assert (~keep).float().mean().item() == pytest.approx(cfg_prob, abs=0.04)


def test_timesteps_cover_the_schedule_and_power_favours_high_noise():
    uniform = random_at(*range(2000)).timesteps
    assert 0 <= uniform.min() < 20
    assert 980 < uniform.max() <= 999
    assert uniform.float().mean().item() == pytest.approx(500, abs=25)
    assert random_at(*range(2000), timestep_power=0.5).timesteps.float().mean().item() == pytest.approx(667, abs=25)


def test_noise_offset_is_constant_over_a_channel():
    difference = random_at(0, noise_offset=0.5).noise - random_at(0).noise
    assert difference.std(dim=(2, 3)).max() < 1e-6
    assert difference.abs().min() > 0


def test_latents_have_the_scale_of_the_vaes_own_sampling():
    vae = tiny_vae()
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        distribution = vae.encode(pixels).latent_dist
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        expected = distribution.sample(generator) * vae.config.scaling_factor
    torch.testing.assert_close(sample_latents(vae, distribution.parameters, noise), expected)


def test_the_layout_of_convolutions_changes_nothing(model):
    latents, tokens, random = torch.randn(2, *LATENT_SHAPE), torch.randn(2, 4, 12), random_at(0, 1)
    other = deepcopy(model)
    other.unet.to(memory_format=torch.channels_last)
    losses = [part(latents, tokens, random)["loss"] for part in (model, other)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    gradients = {name: value.grad for name, value in other.named_parameters()}
    for name, value in model.named_parameters():
        torch.testing.assert_close(gradients[name], value.grad, atol=1e-6, rtol=1e-4, msg=name)


def test_the_moving_average_of_all_weights_at_once():
    model = nn.Linear(3, 2)
    average = MovingAverage(model, decay=0.2)
    average.on_train_begin()
    expected = [value.detach().clone() for value in model.parameters()]
    for decay in (0, 2 / 11, 0.2):  # it rises to that of the run
        with torch.no_grad():
            for value in model.parameters():
                value.add_(torch.randn_like(value))
        average.on_optimizer_step()
        expected = [decay * old + (1 - decay) * new for old, new in zip(expected, model.parameters(), strict=True)]
        torch.testing.assert_close(list(average.gather(keep=True).values()), expected)
