"""The configuration refuses values that could not work, and survives a round trip."""

import pytest
from model_parts import tiny_config
from transformers import AutoConfig, CLIPVisionConfig, LlamaConfig, SiglipVisionConfig

from metamorph.models.configuration_metamorph import MetaMorphConfig


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_image_tokens": 5}, "num_image_tokens=5 is not a square number.*4 and 9"),
        ({"num_image_tokens": 0}, "from 1 to 16384"),
        ({"num_image_tokens": 10**9}, "from 1 to 16384"),
        ({"num_image_tokens": 9, "image_token_reduction": "none"}, "num_image_tokens=16"),
        ({"image_token_reduction": "pool"}, "image_token_reduction='pool'.*interpolation"),
        ({"mm_projector_type": "mlp0x_gelu"}, "mm_projector_type='mlp0x_gelu'.*mlp{N}x_gelu"),
        ({"mm_projector_type": "identity"}, "24 features.*32"),
        ({"vision_head_type": "conv"}, "vision_head_type='conv'.*mlp2x_gelu"),
        ({"vision_coef": float("nan")}, "vision_coef"),
        ({"vision_coef": -1.0}, "vision_coef"),
        ({"mm_vision_select_layer": 3}, "mm_vision_select_layer=3 does not exist.*2 layers"),
    ],
)
def test_bad_values_name_the_flag_and_the_mend(overrides, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**overrides)


@pytest.mark.parametrize(("count", "neighbours"), [(2, "1 and 4"), (50, "49 and 64"), (63, "49 and 64")])
@pytest.mark.parametrize("reduction", ["interpolation", "concat_interpolation"])
def test_r32_non_square_token_counts_are_refused(count, neighbours, reduction):
    with pytest.raises(ValueError, match=f"num_image_tokens={count} is not a square number.*{neighbours}"):
        tiny_config(num_image_tokens=count, image_token_reduction=reduction)


def test_r03_sizes_and_ids_come_from_the_parts():
    config = MetaMorphConfig(
        text_config=LlamaConfig(hidden_size=48, num_attention_heads=4),
        vision_config=CLIPVisionConfig(hidden_size=48, image_size=64, patch_size=16),
        num_image_tokens=4,
        image_token_reduction="concat_interpolation",
    )
    assert (config.patch_grid, config.vision_image_size, config.vision_feature_size) == (4, 64, 192)


def test_guide_defaults():
    config = MetaMorphConfig(vision_config=SiglipVisionConfig(image_size=384, patch_size=14))
    assert config.patch_grid == 27
    assert config.num_image_tokens == 64
    assert config.image_token_reduction == "interpolation"
    assert config.mm_vision_select_layer == -1
    assert config.mm_projector_type == "mlp2x_gelu"
    assert config.vision_head_type == "mlp"
    assert config.normalize_vision
    assert config.mm_use_im_start_end
    assert not config.mm_use_im_patch_token


def test_save_and_load(tmp_path):
    config = tiny_config(vision_coef=0.5, version="chatml")
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, MetaMorphConfig)
    assert loaded.to_diff_dict() == config.to_diff_dict()
    assert isinstance(loaded.vision_config, SiglipVisionConfig)
