"""The visualization pipeline: batches, guidance, padding, saving."""

from __future__ import annotations

import pytest
import torch

from metamorph.visualization.pipeline import VisualizationPipeline, from_unet_latents, to_unet_latents
from metamorph.visualization.projector import PROJECTOR_MODES, VisualizationProjector
from visualization_parts import CROSS_ATTENTION_DIM, RESOLUTION, tiny_scheduler, tiny_unet, tiny_vae


STEPS = 3


def build_pipeline(mode: str = "mlp", num_tokens: int = 77) -> VisualizationPipeline:
    torch.manual_seed(1)
    projector = VisualizationProjector(
        input_dim=12,
        hidden_dim=16,
        output_dim=CROSS_ATTENTION_DIM,
        num_tokens=num_tokens,
        num_heads=2,
        mode=mode,
    ).eval()
    pipeline = VisualizationPipeline.from_parts(projector, tiny_unet(), tiny_vae(), tiny_scheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.fixture(scope="module")
def pipeline() -> VisualizationPipeline:
    return build_pipeline()


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randn(3, 9, 12, generator=torch.Generator().manual_seed(2))


def draw(pipeline: VisualizationPipeline, tokens: torch.Tensor, **options) -> torch.Tensor:
    options = {"num_inference_steps": STEPS, "output_type": "pt", "guidance_scale": 2.0} | options
    return pipeline(tokens, **options).images


def test_batched_equals_single(pipeline, tokens):
    batched = draw(pipeline, tokens, generator=seeded(5, 6, 7))
    assert batched.shape == (3, 3, RESOLUTION, RESOLUTION)
    for index, seed in enumerate((5, 6, 7)):
        single = draw(pipeline, tokens[index], generator=seeded(seed))
        torch.testing.assert_close(batched[index], single[0], rtol=0, atol=1e-4)


def test_one_generator_makes_the_batch_reproducible(pipeline, tokens):
    first = draw(pipeline, tokens, generator=seeded(5)[0])
    assert torch.equal(first, draw(pipeline, tokens, generator=seeded(5)[0]))
    assert not torch.equal(first, draw(pipeline, tokens, generator=seeded(6)[0]))


def test_several_guidance_scales_equal_one_by_one(pipeline, tokens):
    together = draw(pipeline, tokens[:2], guidance_scale=[1.0, 4.0], generator=seeded(5, 6))
    assert len(together) == 4
    for position, scale in enumerate((1.0, 4.0)):
        alone = draw(pipeline, tokens[:2], guidance_scale=scale, generator=seeded(5, 6))
        torch.testing.assert_close(together[position::2], alone, rtol=0, atol=1e-4)


def test_guidance_leads_away_from_the_zero_condition(pipeline, tokens):
    """With an all-zero condition both branches agree, whatever the scale."""
    blank = build_pipeline()
    for parameter in blank.projector.parameters():
        torch.nn.init.zeros_(parameter)
    same = [draw(blank, tokens, guidance_scale=scale, generator=seeded(1, 2, 3)) for scale in (1.0, 5.0)]
    torch.testing.assert_close(*same, rtol=0, atol=1e-5)
    differ = [draw(pipeline, tokens, guidance_scale=scale, generator=seeded(1, 2, 3)) for scale in (1.0, 5.0)]
    assert not torch.allclose(*differ, atol=1e-4)


@pytest.mark.parametrize("mode", PROJECTOR_MODES)
def test_saved_folder_draws_the_same_picture(mode, tokens, tmp_path):
    pipeline = build_pipeline(mode)
    pipeline.save_pretrained(tmp_path)
    loaded = VisualizationPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.scheduler).__name__ == "DPMSolverMultistepScheduler"
    assert loaded.scheduler.config.prediction_type == "v_prediction"
    before = draw(pipeline, tokens, generator=seeded(1, 2, 3))
    assert torch.equal(before, draw(loaded, tokens, generator=seeded(1, 2, 3)))


@pytest.mark.parametrize(("mode", "images_tokens", "expected"), [("mlp", 64, 77), ("mlp", 256, 256), ("xattn", 64, 77)])
def test_r45_condition_that_the_unet_sees(mode, images_tokens, expected):
    pipeline = build_pipeline(mode)
    condition = pipeline._condition(torch.randn(1, images_tokens, 12))
    assert condition.shape == (1, expected, CROSS_ATTENTION_DIM)


def test_pictures_are_pil_by_default(pipeline, tokens):
    images = pipeline(tokens[:1], num_inference_steps=1).images
    assert images[0].size == (RESOLUTION, RESOLUTION)


def test_bfloat16_runs(tokens):
    pipeline = build_pipeline().to(torch.bfloat16)
    images = draw(pipeline, tokens, generator=seeded(1, 2, 3))
    assert images.isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_equals_cpu(tokens):
    on_cpu = draw(build_pipeline(), tokens, generator=seeded(1, 2, 3))
    on_gpu = draw(build_pipeline().to("cuda"), tokens, generator=seeded(1, 2, 3))
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=0, atol=1e-2)


def test_latent_scale_is_undone():
    vae = tiny_vae()
    latents = torch.randn(1, 4, 8, 8)
    torch.testing.assert_close(to_unet_latents(vae, latents), latents * 0.7)
    torch.testing.assert_close(from_unet_latents(vae, to_unet_latents(vae, latents)), latents)


def test_misfits_are_refused(pipeline, tokens):
    with pytest.raises(ValueError, match="2 generators for 3 images"):
        draw(pipeline, tokens, generator=seeded(1, 2))
    with pytest.raises(ValueError, match="latents have shape"):
        draw(pipeline, tokens, latents=torch.zeros(3, 4, 8, 8))
    with pytest.raises(ValueError, match="another vision tower"):
        draw(pipeline, torch.randn(1, 9, 13))
    with pytest.raises(ValueError, match="empty list"):
        draw(pipeline, tokens, guidance_scale=[])
