"""The visualizer's tower gives the visual tokens of the MetaMorph model."""

from __future__ import annotations

import pytest
import torch
from family_parts import save_vision_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, SiglipImageProcessorPil
from visualization_parts import random_images, write_tiny_tower

from metamorph.models.configuration_metamorph import MetaMorphConfig
from metamorph.models.modeling_metamorph import MetaMorphForConditionalGeneration
from metamorph.visualization.pixels import crop_square
from metamorph.visualization.token_options import adopt_token_options, load_encoder
from metamorph.visualizer_training.arguments import VisualizerArguments


pytestmark = pytest.mark.integration


TEXT_CONFIG = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def write_model(folder, family, **options) -> MetaMorphForConditionalGeneration:
    """A MetaMorph model with a tower of that family, written with its image processor."""
    name = save_vision_model(folder / "tower", family)
    config = MetaMorphConfig(
        text_config=TEXT_CONFIG,
        vision_config=AutoConfig.from_pretrained(name),
        image_token_id=3,
        image_start_token_id=4,
        image_end_token_id=5,
        **{"num_image_tokens": 4, "mm_vision_select_layer": -2, **options},
    )
    torch.manual_seed(1)
    model = MetaMorphForConditionalGeneration(config).eval()
    for weight in model.parameters():  # no weight keeps a value that a fresh tower would have, such as 1 of a norm
        weight.data += 0.1 * torch.randn_like(weight)
    model.save_pretrained(folder / "model")
    SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder / "model")
    return model


@pytest.mark.parametrize(
    ("family", "reduction"),
    [
        ("siglip", "interpolation"),
        ("siglip", "concat_interpolation"),
        ("siglip", "mlpmixer"),
        ("clip", "interpolation"),
        ("dinov2", "interpolation"),
    ],
)
@pytest.mark.parametrize("apply_softmax", [False, True])
def test_tokens_equal_those_of_the_model(family, reduction, apply_softmax, tmp_path):
    model = write_model(tmp_path, family, image_token_reduction=reduction, apply_softmax=apply_softmax)
    args = adopt_token_options(VisualizerArguments("out", vision_tower=str(tmp_path / "model")))
    assert (args.num_tokens, args.mm_vision_select_layer, args.image_token_reduction) == (4, -2, reduction)
    encoder = load_encoder(args)
    images = [crop_square(image) for image in random_images(2)]
    processor = SiglipImageProcessorPil.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        expected = model.get_visual_tokens(processor(images, return_tensors="pt").pixel_values)
        tokens = encoder(torch.stack([encoder.pixel_format.pixels(image) for image in images]))
    torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-6)


def test_model_folder_without_weights_of_its_tower(tmp_path):
    write_model(tmp_path, "siglip")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    kept = {name: value for name, value in weights.items() if not name.endswith("position_embedding.weight")}
    save_file(kept, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights, for example model\.vision_tower"):
        load_encoder(VisualizerArguments("out", vision_tower=str(tmp_path / "model")))


@torch.no_grad()
def test_plain_tower_with_softmax_gives_distributions(tmp_path):
    args = VisualizerArguments("out", vision_tower=str(write_tiny_tower(tmp_path)), num_tokens=4, apply_softmax=True)
    tokens = load_encoder(args)(torch.randn(1, 3, 32, 32))
    torch.testing.assert_close(tokens.sum(dim=-1), torch.ones(1, 4))
    assert tokens.min() > 0


def test_plain_tower_cannot_have_a_trained_reduction(tmp_path):
    args = VisualizerArguments(
        "out",
        vision_tower=str(write_tiny_tower(tmp_path)),
        num_tokens=4,
        image_token_reduction="mlpmixer",
    )
    with pytest.raises(ValueError, match="folder of the MetaMorph model"):
        load_encoder(args)
