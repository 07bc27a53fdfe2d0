"""The visualization pipeline: batches, guidance, padding, saving."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler
from visualization_parts import CROSS_ATTENTION_DIM, RESOLUTION, random_images, tiny_scheduler, tiny_unet, tiny_vae

from metamorph.visualization.pipeline import VisualizationPipeline, from_unet_latents, to_unet_latents
from metamorph.visualization.projector import PROJECTOR_MODES, VisualizationProjector


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


@pytest.mark.parametrize("is_stochastic", [False, True])
@pytest.mark.parametrize("scales", [[1.0, 4.0], [3.0, 1.0, 0.5], [1.0, 1.0], [4.0, 2.0]])
def test_several_guidance_scales_equal_one_by_one(tokens, scales, is_stochastic):
    """A stochastic sampler gives all scales of an image the same noise, too."""
    pipeline = build_pipeline()
    if is_stochastic:
        pipeline.scheduler = EulerAncestralDiscreteScheduler.from_config(pipeline.scheduler.config)
    together = draw(pipeline, tokens, guidance_scale=scales, generator=seeded(5, 6, 7))
    assert len(together) == 3 * len(scales)
    for position, scale in enumerate(scales):
        alone = draw(pipeline, tokens, guidance_scale=scale, generator=seeded(5, 6, 7))
        torch.testing.assert_close(together[position :: len(scales)], alone, rtol=0, atol=1e-4)


def test_unconditional_predictions_are_shared_where_possible(pipeline, tokens):
    """Two rows per image in the first step, where all scales are one; then none for the scale that needs none."""
    sizes = []

    def count(module, args, options):
        sizes.append(args[0].shape[0])

    hook = pipeline.unet.register_forward_pre_hook(count, with_kwargs=True)
    for scale in (1.0, 2.0, [1.0, 2.0, 3.0]):
        draw(pipeline, tokens, guidance_scale=scale, generator=seeded(5, 6, 7))
    hook.remove()
    assert sizes == [3] * STEPS + [6] * STEPS + [6] + [15] * (STEPS - 1)


@pytest.mark.slow
def test_compiled_in_place_draws_and_saves_the_same(pipeline, tokens, tmp_path):
    compiled = build_pipeline().compile(backend="eager")  # the tracing is real, the C++ compiler is left out
    expected = draw(pipeline, tokens, generator=seeded(1, 2, 3))
    torch.testing.assert_close(draw(compiled, tokens, generator=seeded(1, 2, 3)), expected, rtol=0, atol=1e-4)
    assert compiled.unet.state_dict().keys() == pipeline.unet.state_dict().keys()
    compiled.save_pretrained(tmp_path)
    loaded = VisualizationPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(draw(loaded, tokens, generator=seeded(1, 2, 3)), expected)


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
def test_saved_folder_draws_the_same_image(mode, tokens, tmp_path):
    pipeline = build_pipeline(mode)
    pipeline.save_pretrained(tmp_path)
    loaded = VisualizationPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.scheduler).__name__ == "DPMSolverMultistepScheduler"
    assert loaded.scheduler.config.prediction_type == "v_prediction"
    before = draw(pipeline, tokens, generator=seeded(1, 2, 3))
    assert torch.equal(before, draw(loaded, tokens, generator=seeded(1, 2, 3)))


@pytest.mark.parametrize("count", [64, 77, 256])
@pytest.mark.parametrize("mode", PROJECTOR_MODES)
def test_r45_condition_that_the_unet_sees(mode, count):
    """Padded with zeros to 77 and never beyond, whether the tokens are the images' own (mlp) or learned queries."""
    pipeline = build_pipeline(mode, num_tokens=count)
    condition = pipeline._condition(torch.randn(1, count if mode == "mlp" else 9, 12))
    assert condition.shape == (1, max(count, 77), CROSS_ATTENTION_DIM)
    assert condition[:, :count].any(dim=-1).all()
    assert not condition[:, count:].any()


def test_folder_of_a_release_without_vision_towers_loads(tokens, tmp_path):
    build_pipeline().save_pretrained(tmp_path)
    file = Path(tmp_path / "model_index.json")
    index = json.loads(file.read_text())
    assert index.pop("vision_tower") == [None, None]
    file.write_text(json.dumps(index))
    loaded = VisualizationPipeline.from_pretrained(tmp_path)
    assert loaded.vision_tower is None
    with pytest.raises(ValueError, match="--save_vision_tower"):
        loaded(images=random_images(1))


def test_drawings_are_pil_by_default(pipeline, tokens):
    images = pipeline(tokens[:1], num_inference_steps=1).images
    assert images[0].size == (RESOLUTION, RESOLUTION)


def test_bfloat16_runs(tokens):
    pipeline = build_pipeline().to(torch.bfloat16)
    images = draw(pipeline, tokens, generator=seeded(1, 2, 3))
    assert images.isfinite().all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_equals_cpu(tokens):
    on_cpu = draw(build_pipeline(), tokens, generator=seeded(1, 2, 3))
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # by default convolutions round their inputs
        on_gpu = draw(build_pipeline().to("cuda"), tokens, generator=seeded(1, 2, 3))
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=0, atol=1e-3)


def test_latent_scale_is_undone():
    vae = tiny_vae()
    latents = torch.randn(1, 4, 8, 8)
    torch.testing.assert_close(to_unet_latents(vae, latents), latents * 0.7)
    torch.testing.assert_close(from_unet_latents(vae, to_unet_latents(vae, latents)), latents)


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_no_images_give_no_drawings(pipeline, tokens, output_type):
    """An answer may have no image: the documented call then draws none."""
    one = draw(pipeline, tokens[:1], output_type=output_type)
    none = draw(pipeline, tokens[:0], output_type=output_type, generator=[], guidance_scale=[1.0, 3.0])
    assert len(none) == 0
    assert type(none) is type(one)
    if output_type != "pil":
        assert none.shape[1:] == one.shape[1:]
        assert none.dtype == one.dtype


def test_misfits_are_refused(pipeline, tokens):
    with pytest.raises(ValueError, match="2 generators for 3 images"):
        draw(pipeline, tokens, generator=seeded(1, 2))
    with pytest.raises(ValueError, match="latents have shape"):
        draw(pipeline, tokens, latents=torch.zeros(3, 4, 8, 8))
    with pytest.raises(ValueError, match="another vision tower"):
        draw(pipeline, torch.randn(1, 9, 13))
    with pytest.raises(ValueError, match="empty list"):
        draw(pipeline, tokens, guidance_scale=[])
    with pytest.raises(ValueError, match="either visual_tokens or images"):
        pipeline()
    with pytest.raises(ValueError, match="either visual_tokens or images"):
        pipeline(tokens, images=random_images(1))
