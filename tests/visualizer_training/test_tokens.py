"""How many tokens come in and go out: training, saving, loading and drawing with 64, 77 and 256."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import SiglipImageProcessorPil, SiglipVisionConfig, SiglipVisionModel
from visualization_parts import CROSS_ATTENTION_DIM, RESOLUTION, random_images, write_tiny_diffusion

from metamorph.visualization import VisualizationPipeline, VisualizerArguments, train_visualizer


pytestmark = pytest.mark.integration


FEATURES = 24


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> dict[str, str]:
    """A tower with 16×16 patches, and the parts of a diffusion model."""
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    config = SiglipVisionConfig(
        hidden_size=FEATURES,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=64,
        patch_size=4,
    )
    SiglipVisionModel(config).save_pretrained(folder / "tower")
    SiglipImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder / "tower")
    return {
        "vision_tower": str(folder / "tower"),
        "pretrained_model_name_or_path": str(write_tiny_diffusion(folder / "diffusion")),
    }


def arguments(parts: dict[str, str], output_dir: Path, **options) -> VisualizerArguments:
    sizes = {"hidden_dim": 16, "num_heads": 2, "resolution": RESOLUTION, "training_steps": 2, "batch_size": 2}
    return VisualizerArguments(**(parts | {"output_dir": str(output_dir)} | sizes | options))


def load(folder: Path) -> VisualizationPipeline:
    pipeline = VisualizationPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: VisualizationPipeline, tokens: torch.Tensor) -> torch.Tensor:
    generator = [torch.Generator().manual_seed(seed) for seed in range(len(tokens))]
    return pipeline(tokens, num_inference_steps=2, generator=generator, output_type="pt").images


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"num_tokens": 64}, 77),  # padded
        ({"num_tokens": 256}, 256),  # longer than what Stable Diffusion knows, and not cut
        ({"num_tokens": 64, "mode": "xattn", "num_query_tokens": 64}, 77),
        ({"num_tokens": 256, "mode": "xattnffn", "num_query_tokens": 77}, 77),
        ({"num_tokens": 64, "mode": "transformer", "num_query_tokens": 256}, 256),
    ],
)
def test_r45_condition_is_as_long_in_training_as_in_drawing(options, expected, parts, tmp_path):
    args = arguments(parts, tmp_path / "out", **options)
    result = train_visualizer(args, random_images(4))
    assert len(result.losses) == 2
    pipeline = load(result.output_dir)
    seen = []
    pipeline.unet.register_forward_pre_hook(
        lambda module, positional, named: seen.append(named["encoder_hidden_states"].shape), with_kwargs=True
    )
    tokens = torch.randn(2, args.num_tokens, FEATURES, generator=torch.Generator().manual_seed(1))
    drawn = draw(pipeline, tokens)
    assert set(seen) == {(4, expected, CROSS_ATTENTION_DIM)}  # two images, with and without condition
    pipeline.save_pretrained(tmp_path / "again")
    assert torch.equal(drawn, draw(load(tmp_path / "again"), tokens))


def test_77_visual_tokens_are_no_square_of_patches(parts, tmp_path):
    with pytest.raises(ValueError, match="num_image_tokens=77"):
        train_visualizer(arguments(parts, tmp_path / "out", num_tokens=77), random_images(4))
