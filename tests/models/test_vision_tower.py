"""The tower: every supported family, layer selection, reductions, gradients, errors."""

import pytest
import torch
from model_parts import build_tiny_model, tiny_config
from transformers import (
    AutoModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionModel,
    SiglipModel,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from metamorph.models.vision_tower import (
    VisionTower,
    load_vision_config,
    load_vision_encoder,
    resolve_vision_tower,
)


SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 8}
FAMILIES = {
    "siglip_vision_model": {"image_size": 32, "intermediate_size": 48},
    "siglip2_vision_model": {"num_patches": 16, "intermediate_size": 48},
    "clip_vision_model": {"image_size": 32, "intermediate_size": 48},
    "dinov2": {"image_size": 32},
    "dinov2_with_registers": {"image_size": 32, "num_register_tokens": 3},
}


def family_config(model_type: str, **overrides):
    return tiny_config(vision_config={"model_type": model_type, **SIZES, **FAMILIES[model_type]}, **overrides)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_families_match_their_own_hidden_states(model_type):
    """The cut encoder gives hidden state -1 of the full one: patches only, before the final norm."""
    config = family_config(model_type, image_token_reduction="none", num_image_tokens=16, normalize_vision=False)
    torch.manual_seed(0)
    encoder = AutoModel.from_config(config.vision_config).eval()
    pixels = torch.randn(2, 3, 32, 32)
    if model_type == "siglip2_vision_model":
        patches = pixels.reshape(2, 3, 4, 8, 4, 8).permute(0, 2, 4, 3, 5, 1).reshape(2, 16, 192)
        inputs = {
            "pixel_values": patches,
            "pixel_attention_mask": torch.ones(2, 16, dtype=torch.long),
            "spatial_shapes": torch.tensor([[4, 4], [4, 4]]),
        }
    else:
        inputs = {"pixel_values": pixels}
    with torch.no_grad():
        hidden_states = encoder(**inputs, output_hidden_states=True).hidden_states
    prefix = {"clip_vision_model": 1, "dinov2": 1, "dinov2_with_registers": 4}.get(model_type, 0)
    tower = VisionTower(config, encoder)
    torch.testing.assert_close(tower(pixels), hidden_states[-1][:, prefix:], rtol=0, atol=1e-6)


@pytest.mark.parametrize("layer", [-1, -2, 0, 1, 2])
def test_select_layer(layer):
    config = family_config(
        "siglip_vision_model",
        mm_vision_select_layer=layer,
        image_token_reduction="none",
        num_image_tokens=16,
        normalize_vision=False,
    )
    torch.manual_seed(0)
    encoder = AutoModel.from_config(config.vision_config).eval()
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = encoder(pixels, output_hidden_states=True).hidden_states[layer]
    torch.testing.assert_close(VisionTower(config, encoder)(pixels), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("reduction", ["interpolation", "concat_interpolation", "mlpmixer", "none"])
@pytest.mark.parametrize("normalize", [True, False])
def test_reductions_have_the_promised_shape(reduction, normalize):
    count = 16 if reduction == "none" else 4
    config = tiny_config(image_token_reduction=reduction, num_image_tokens=count, normalize_vision=normalize)
    tokens = VisionTower(config)(torch.randn(3, 3, 32, 32))
    assert tokens.shape == (3, count, config.vision_feature_size)
    norms = tokens.norm(dim=-1)
    assert torch.allclose(norms, torch.ones_like(norms)) == normalize


@pytest.mark.parametrize("layer", [-1, -2, 0])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_r32_frozen_tower_has_no_gradient_and_a_trained_one_has_them_all(model_type, layer):
    """Parallel training stops at a weight without a gradient, such as DINOv2's mask token."""
    tower = VisionTower(family_config(model_type, mm_vision_select_layer=layer))
    pixels = torch.randn(1, 3, 32, 32)
    tower.requires_grad_(False)
    assert not tower(pixels).requires_grad
    tower.requires_grad_(True)
    with torch.no_grad():
        assert not tower(pixels).requires_grad
    tower(pixels)[..., 0].sum().backward()
    assert [name for name, parameter in tower.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("model_type", ["dinov2", "dinov2_with_registers"])
def test_mask_token_keeps_its_place_in_checkpoints(model_type):
    config = family_config(model_type)
    encoder = AutoModel.from_config(config.vision_config)
    with torch.no_grad():
        encoder.embeddings.mask_token.fill_(3.0)
    state = {f"encoder.{name}": value for name, value in encoder.state_dict().items() if "layernorm" not in name}
    tower = VisionTower(config)
    tower.load_state_dict(state)
    assert (tower.encoder.embeddings.mask_token == 3).all()


def test_frozen_tower_has_no_dropout_in_training():
    """Inputs and targets of the same image must be the same in every step."""
    tower = VisionTower(tiny_config(vision_config={"attention_dropout": 0.5}))
    pixels = torch.randn(1, 3, 32, 32)
    tower.requires_grad_(False).train()
    assert torch.equal(tower(pixels), tower(pixels))
    tower.requires_grad_(True).train()
    assert not torch.equal(tower(pixels), tower(pixels))


def test_r32_image_size_is_checked():
    with pytest.raises(ValueError, match=r"64x64.*expects 32x32"):
        VisionTower(tiny_config())(torch.randn(1, 3, 64, 64))


def test_r32_the_tower_argument_decides(tmp_path):
    """Full CLIP/SigLIP checkpoints and bare towers load, with exactly their weights."""
    config = tiny_config().vision_config
    torch.manual_seed(1)
    bare = SiglipVisionModel(config)
    bare.save_pretrained(tmp_path / "bare")
    loaded = load_vision_encoder(str(tmp_path / "bare"))
    assert torch.equal(loaded.embeddings.patch_embedding.weight, bare.embeddings.patch_embedding.weight)

    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"vocab_size": 20, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config={**SIZES, "image_size": 32, "intermediate_size": 48}))
    clip.save_pretrained(tmp_path / "clip")
    loaded = load_vision_encoder(str(tmp_path / "clip"))
    assert isinstance(loaded, CLIPVisionModel)
    weights = {name.removeprefix("vision_model."): value for name, value in loaded.state_dict().items()}
    reference = {name.removeprefix("vision_model."): v for name, v in clip.vision_model.state_dict().items()}
    assert all(torch.equal(weights[name], reference[name]) for name in reference)


def test_unknown_layout_is_an_error_before_weights_are_read(tmp_path):
    ViTModel(ViTConfig(**SIZES, image_size=32, intermediate_size=48)).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model type 'vit'.*siglip_vision_model"):
        load_vision_config(str(tmp_path))


def test_alias_of_the_guide():
    assert resolve_vision_tower("siglip/CLIP-ViT-SO400M-14-384") == "google/siglip-so400m-patch14-384"
    assert resolve_vision_tower("some/folder") == "some/folder"


def test_whole_siglip_model_gives_its_vision_half(tmp_path):
    from transformers import SiglipConfig

    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"vocab_size": 20, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    vision = {**SIZES, "image_size": 32, "intermediate_size": 48}
    full = SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).eval()
    full.save_pretrained(tmp_path)
    config = tiny_config(image_token_reduction="none", num_image_tokens=16, normalize_vision=False)
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = full.vision_model(pixels, output_hidden_states=True).hidden_states[-1]
    tokens = VisionTower(config, load_vision_encoder(str(tmp_path)).eval())(pixels)
    torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-6)


def test_later_layers_and_heads_are_not_kept():
    model = build_tiny_model(mm_vision_select_layer=-2)
    names = [name for name, _ in model.model.vision_tower.named_parameters()]
    assert any("layers.0" in name for name in names)
    assert not any("layers.1" in name or "head" in name or "post_layernorm" in name for name in names)


def test_trained_tower_evaluates_outside_of_inference_mode():
    """Engines that shard its weights gather them in a call and keep what they gathered."""
    model = build_tiny_model().train()
    pixels = torch.randn(1, 3, 32, 32)
    inside = []
    hook = model.model.vision_tower.encoder.register_forward_hook(
        lambda *_: inside.append(torch.is_inference_mode_enabled())
    )
    with torch.no_grad():
        model.get_visual_tokens(pixels)
        model.model.vision_tower.requires_grad_(False)
        model.get_visual_tokens(pixels)
    hook.remove()
    assert inside == [False, True]
