"""The visualizer's tower gives the visual tokens of the MetaMorph model."""

from __future__ import annotations

import pytest
import torch
from transformers import SiglipImageProcessor, SiglipVisionModel

from metamorph.models.configuration_metamorph import MetaMorphConfig
from metamorph.models.modeling_metamorph import MetaMorphForConditionalGeneration
from metamorph.visualization.arguments import VisualizerArguments
from metamorph.visualization.data import crop_square
from metamorph.visualization.parts import adopt_token_options, load_tower
from visualization_parts import random_images, write_tiny_tower


TEXT_CONFIG = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize("reduction", ["interpolation", "concat_interpolation", "mlpmixer"])
def test_tokens_equal_those_of_the_model(reduction, tmp_path):
    encoder = SiglipVisionModel.from_pretrained(write_tiny_tower(tmp_path / "tower"))
    config = MetaMorphConfig(
        text_config=TEXT_CONFIG,
        vision_config=encoder.config,
        num_image_tokens=4,
        image_token_reduction=reduction,
        mm_vision_select_layer=-2,
        image_token_id=3,
        image_start_token_id=4,
        image_end_token_id=5,
    )
    torch.manual_seed(1)
    model = MetaMorphForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "model")
    processor = SiglipImageProcessor(size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path / "model")

    args = adopt_token_options(VisualizerArguments("out", vision_tower=str(tmp_path / "model")))
    assert (args.num_tokens, args.mm_vision_select_layer, args.image_token_reduction) == (4, -2, reduction)
    tower, pixel_format = load_tower(args)
    images = [crop_square(image) for image in random_images(2)]
    with torch.no_grad():
        expected = model.get_visual_tokens(processor(images, return_tensors="pt").pixel_values)
        tokens = tower.eval()(torch.stack([pixel_format.pixels(image) for image in images]))
    torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-6)


def test_plain_tower_cannot_have_a_trained_reduction(tmp_path):
    args = VisualizerArguments(
        "out",
        vision_tower=str(write_tiny_tower(tmp_path)),
        num_tokens=4,
        image_token_reduction="mlpmixer",
    )
    with pytest.raises(ValueError, match="folder of the MetaMorph model"):
        load_tower(args)
