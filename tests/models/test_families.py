"""Families of language models: the composite computes what the family computes by itself, or refuses it by name."""

from pathlib import Path

import pytest
import torch
from family_parts import chatml_tokenizer
from model_parts import build_batch, build_tiny_model, tiny_config
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedConfig, SiglipVisionModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from metamorph.data.batching.collation import PackedCollator, PaddedCollator
from metamorph.models import families
from metamorph.models.configuration_metamorph import MetaMorphConfig
from metamorph.models.modeling_metamorph import MetaMorphForConditionalGeneration
from metamorph.training.arguments import ModelArguments
from metamorph.training.build import resolve_model
from metamorph.training.engines.speed import recompute_layers
from metamorph.training.metrics import count_tokens
from metamorph.training.stages import apply_stage


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MAMBA2 = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
SCALED = {
    "cohere": {"logit_scale": 0.3},
    "falcon_h1": {"lm_head_multiplier": 0.04, "embedding_multiplier": 5.7, **MAMBA2},
    "gemma2": {"final_logit_softcapping": 3.0},
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 3.0},
    "hyperclovax": {"logits_scaling": 8.0, "embedding_multiplier": 3.0},
    "llama4_text": {"intermediate_size_mlp": 64, "num_local_experts": 2},
}
PER_LAYER = {"hidden_size_per_layer_input": 4, "num_kv_shared_layers": 0, "layer_types": ["full_attention"] * 2}
REFUSED = {
    "mamba": ({"state_size": 4}, "MambaOutput"),
    "gemma4_text": (PER_LAYER, "the composite fails: RuntimeError"),
    "gemma3n_text": ({**PER_LAYER, "laurel_rank": 4, "activation_sparsity_pattern": [0.0, 0.0]}, "logits differ by"),
    "bert": ({}, "differ by"),
    "t5": ({}, "not a decoder-only language model"),
}
MOE = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
}


def family_config(family: str, **fields: object) -> PreTrainedConfig:
    known = AutoConfig.for_model(family).to_dict()
    sizes = {name: value for name, value in SIZES.items() if name in known}
    if "vocab_size_per_layer_input" in known:
        sizes["vocab_size_per_layer_input"] = fields["vocab_size"]
    return AutoConfig.for_model(family, **sizes, **fields)


@pytest.mark.parametrize("family", SCALED)
def test_logits_on_text_are_those_of_the_language_model(family: str) -> None:
    tokenizer = chatml_tokenizer()
    known = len(tokenizer)
    torch.manual_seed(0)
    config = family_config(family, vocab_size=known + 3, **SCALED[family])
    language_model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in language_model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        ids = torch.randint(3, known, (2, 9))
        expected = language_model(input_ids=ids, use_cache=False).logits
        tower = SiglipVisionModel(tiny_config().vision_config)
        model = MetaMorphForConditionalGeneration.from_parts(language_model, tower, tokenizer, num_image_tokens=4)
        found = model.eval()(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found[..., :known], expected[..., :known])  # the rows of new tokens have changed


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_is_computed_otherwise_is_refused_by_name(family: str) -> None:
    fields, reason = REFUSED[family]
    config = family_config(family, vocab_size=64, **fields)
    with pytest.raises(ValueError, match=rf"type {family} cannot be used.*{reason}.*use another language model"):
        MetaMorphForConditionalGeneration.check_language_model(config)


def test_a_family_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    family_config("mamba", vocab_size=400, state_size=4).save_pretrained(tmp_path)
    chatml_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tower").mkdir()
    args = ModelArguments(model_name_or_path=str(tmp_path), vision_tower=str(tmp_path), from_scratch_connector=True)
    with pytest.raises(ValueError, match=r"--model_name_or_path .* language models of type mamba cannot be used"):
        resolve_model(args)


def test_the_weights_tell_where_no_small_copy_can_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "_MOST_WEIGHTS", 0)
    monkeypatch.setattr(families, "_SUPPORT", {})
    tokenizer, tower = chatml_tokenizer(), SiglipVisionModel(tiny_config().vision_config)
    for family, fields in (("granite", SCALED["granite"]), ("gemma3n_text", REFUSED["gemma3n_text"][0])):
        config = family_config(family, vocab_size=len(tokenizer) + 3, initializer_range=0.21, **fields)
        language_model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in language_model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        assert not MetaMorphForConditionalGeneration.check_language_model(config).is_known
        if family == "granite":
            MetaMorphForConditionalGeneration.from_parts(language_model, tower, tokenizer, num_image_tokens=4)
            continue
        with pytest.raises(ValueError, match=r"gemma3n_text cannot be used.*logits differ by"):
            MetaMorphForConditionalGeneration.from_parts(language_model, tower, tokenizer, num_image_tokens=4)


def test_the_copy_is_small_and_random_generators_stay_as_they_are() -> None:
    """Of the shape of Llama-3 8B."""
    config = AutoConfig.for_model(
        "llama",
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        eos_token_id=128001,
    )
    copy = families._small_copy(LlamaForCausalLM, config)
    assert sum(parameter.numel() for parameter in copy.parameters()) < 10e6
    state = torch.get_rng_state()
    assert MetaMorphForConditionalGeneration.check_language_model(config) == families.FamilySupport(is_known=True)
    assert torch.equal(state, torch.get_rng_state())
    assert config.num_hidden_layers == 32


@pytest.mark.parametrize(
    ("family", "fields", "unused"),
    [
        ("ernie4_5_moe", {"moe_num_experts": 4, "moe_k": 2}, "e_score_correction_bias"),
        ("afmoe", {"num_experts": 4, "num_experts_per_tok": 2, "num_dense_layers": 1}, "expert_bias"),
    ],
)
def test_no_weight_of_a_stage_is_without_a_gradient(family: str, fields: dict, unused: str, tmp_path: Path) -> None:
    """Of some families there are weights that never have one; parallel training would stop at them."""
    text = family_config(family, vocab_size=64, moe_intermediate_size=16, **fields).to_dict()
    model = MetaMorphForConditionalGeneration(MetaMorphConfig(**{**tiny_config().to_dict(), "text_config": text}))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    apply_stage(model, ModelArguments(str(tmp_path), vision_tower=str(tmp_path), from_scratch_connector=True))
    model.train()(**build_batch(model.config)).loss.backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    frozen = [name for name, weight in model.get_decoder().named_parameters() if not weight.requires_grad]
    assert frozen
    assert all(name.endswith(unused) for name in frozen)


def mixture(family: str, **text: object) -> MetaMorphForConditionalGeneration:
    return build_tiny_model(text_config={"model_type": family, **MOE[family], "router_aux_loss_coef": 0.5, **text})


@pytest.mark.parametrize("family", MOE)
def test_the_loss_of_experts_is_added_as_transformers_computes_it(family: str) -> None:
    model = mixture(family).train()
    batch = build_batch(model.config)
    output = model(**batch)
    logits = model.model(
        **{name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}, output_router_logits=True
    ).router_logits
    expected = load_balancing_loss_func(logits, 4, 2, batch["attention_mask"])
    torch.testing.assert_close(output.aux_loss, expected)
    assert output.num_tokens == batch["attention_mask"].sum()
    coefficient = model.config.vision_coef
    torch.testing.assert_close(output.loss, output.text_loss + coefficient * output.visual_loss + 0.5 * expected)
    output.aux_loss.backward()
    router = next(weight for name, weight in model.named_parameters() if name.endswith("mlp.gate.weight"))
    assert router.grad.abs().sum() > 0


@pytest.mark.parametrize("selective", [False, True])
def test_the_loss_of_experts_has_the_same_gradients_with_recomputation(selective: bool) -> None:
    gradients = []
    for recompute in (False, True):
        model = mixture("mixtral").train()
        if recompute:
            recompute_layers(model, selective=selective)
        model(**build_batch(model.config)).aux_loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_experts_are_balanced_where_they_are_trained_or_the_configuration_says_so() -> None:
    batch = build_batch(tiny_config())
    model = mixture("mixtral")
    assert model(**batch).aux_loss is None  # evaluation
    assert model.train()(**batch).aux_loss is not None
    model.model.language_model.requires_grad_(False)
    assert model(**batch).aux_loss is None
    assert mixture("mixtral", output_router_logits=True)(**batch).aux_loss is not None
    assert mixture("mixtral", router_aux_loss_coef=0.0).train()(**batch).aux_loss is None
    assert build_tiny_model().train()(**batch).aux_loss is None


def test_the_loss_of_experts_of_parts_is_their_mean_over_tokens() -> None:
    """Padding does not count, and a packed row of one sample is that sample."""
    model = mixture("qwen3_moe").train()
    examples = []
    for index, kind in enumerate("tvg"):
        batch = build_batch(model.config, kind, seed=index)
        names = ("input_ids", "labels", "visual_target_mask")
        example = {name: batch[name][0] for name in names} | {"pixel_values": batch["pixel_values"]}
        examples.append({name: value for name, value in example.items() if value is not None})
    image = model.config.image_token_id
    padded, packed = PaddedCollator(0, image), PackedCollator(0, image_token_id=image)
    parts = [padded(examples[:2]), padded(examples[2:])]
    total = sum(count_tokens(part) for part in parts)
    assert total == sum(len(example["input_ids"]) for example in examples)
    outputs = [model(**part, loss_normalizers=(1.0, 1.0, total)) for part in parts]
    means = [model(**part) for part in parts]
    expected = sum(mean.aux_loss * mean.num_tokens for mean in means) / total
    torch.testing.assert_close(sum(output.aux_loss for output in outputs), expected)
    rows = packed([[example] for example in examples])
    together = padded(examples)
    assert torch.equal(rows["indices"]["tokens"], together["indices"]["tokens"])
    torch.testing.assert_close(model(**rows).aux_loss, model(**together).aux_loss)
    torch.testing.assert_close(model(**PaddedCollator(0)(examples)).aux_loss, model(**together).aux_loss)


def test_a_batch_of_skipped_records_has_a_finite_loss_of_experts() -> None:
    model = mixture("mixtral").train()
    for collator, empty in ((PaddedCollator, [{"skipped": "bad"}]), (PackedCollator, [[{"skipped": "bad"}]])):
        batch = collator(0, image_token_id=model.config.image_token_id)(empty)
        assert torch.isfinite(model(**batch).loss)
