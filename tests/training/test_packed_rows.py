"""Packed rows compute what padded rows do: losses of each sample, gradients, and no sample sees another."""

import pytest
import torch
from model_parts import build_batch, build_tiny_model
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids

from metamorph.data.batching.collation import PackedCollator, PaddedCollator, flash_attention_boundaries
from metamorph.training.engines.attention import check_keeps_samples_apart, uses_flash_attention


KINDS = "tvgmvtgm"
"""Text, question about an image, generation, edit of an image (two images): each twice."""
ROWS = ((0, 1, 2), (3, 4, 5, 6), (7,))


def samples_of(config, kinds: str = KINDS) -> list[dict]:
    """One sample for each letter, of lengths that differ by kind."""
    samples = []
    for index, kind in enumerate(kinds):
        batch = build_batch(config, kind, seed=index)
        names = ("input_ids", "labels", "visual_target_mask", "pixel_values")
        row = {name: batch[name] for name in names if batch[name] is not None}
        samples.append({name: value if name == "pixel_values" else value[0] for name, value in row.items()})
    return samples


def packed(samples: list[dict], rows=ROWS) -> dict:
    return PackedCollator(0)([[samples[index] for index in row] for row in rows])


def only_targets_of(batch: dict, sample: int, rows=ROWS) -> dict:
    """The same batch, in which only the targets of one sample are left."""
    row = next(number for number, members in enumerate(rows) if sample in members)
    numbers = (batch["position_ids"] == 0).cumsum(dim=1) - 1
    mine = torch.zeros_like(batch["visual_target_mask"])
    mine[row] = numbers[row] == rows[row].index(sample)
    labels = batch["labels"].masked_fill(~mine, -100)
    return {**batch, "labels": labels, "visual_target_mask": batch["visual_target_mask"] & mine}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_equals_unpacked_for_each_sample(attention: str) -> None:
    model = build_tiny_model()
    model.set_attn_implementation(attention)
    samples = samples_of(model.config)
    batch = packed(samples)
    assert batch["input_ids"].shape[0] == len(ROWS)
    with torch.no_grad():
        for index, sample in enumerate(samples):
            alone = model(**PaddedCollator(0)([sample]))
            ours = model(**only_targets_of(batch, index))
            assert ours.num_text_tokens == alone.num_text_tokens > 0
            assert ours.num_visual_tokens == alone.num_visual_tokens
            assert (alone.num_visual_tokens > 0) == (KINDS[index] in "gm")
            torch.testing.assert_close(ours.text_loss, alone.text_loss, atol=1e-5, rtol=0)
            torch.testing.assert_close(ours.visual_loss, alone.visual_loss, atol=1e-5, rtol=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_equals_padded_in_losses_and_gradients(attention: str) -> None:
    gradients = []
    for collate in (packed, PaddedCollator(0)):
        model = build_tiny_model()
        model.set_attn_implementation(attention)
        output = model(**collate(samples_of(model.config)))
        output.loss.backward()
        named = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
        gradients.append(named | {"text": output.text_loss.detach(), "visual": output.visual_loss.detach()})
    ours, theirs = gradients
    assert ours.keys() == theirs.keys()
    assert any(name.startswith("vision_head") for name in ours)
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_sample_is_not_changed_by_its_neighbours(attention: str) -> None:
    """Also without labels, when a cache would be made by default: with a cache, samples would leak."""
    model = build_tiny_model()
    model.set_attn_implementation(attention)
    samples = samples_of(model.config, "tt")
    other = {**samples[0], "input_ids": samples[0]["input_ids"].flip(0)}
    length = len(other["input_ids"])
    logits = []
    for first in (samples[0], other):
        batch = packed([first, samples[1]], rows=((0, 1),))
        with torch.no_grad():
            logits.append(model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits)
    assert not torch.allclose(logits[0][:, :length], logits[1][:, :length])
    torch.testing.assert_close(logits[0][:, length:], logits[1][:, length:])


def test_packed_with_gradient_checkpointing() -> None:
    losses = []
    for checkpointing in (False, True):
        model = build_tiny_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        losses.append(model(**packed(samples_of(model.config))).loss)
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])
def test_rows_that_mix_are_refused(attention: str) -> None:
    """A state-space model carries a state along the row: position ids do not reset it, whatever the attention."""
    for model in (build_tiny_model(), build_tiny_model(text_config=MAMBA), build_tiny_model(text_config=HYBRID)):
        config = model.get_decoder().config
        config._attn_implementation = attention
        if config.model_type == "llama":
            check_keeps_samples_apart(model)
        else:
            with pytest.raises(ValueError, match=rf"--packing True .* of type {config.model_type}: .*--packing False"):
                check_keeps_samples_apart(model)
        assert config._attn_implementation == attention


MAMBA = {
    "model_type": "mamba",
    "vocab_size": 64,
    "hidden_size": 32,
    "state_size": 4,
    "num_hidden_layers": 1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


HYBRID = {"model_type": "lfm2", "layer_types": ["conv", "full_attention"], "block_ff_dim": 64}


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "smollm3"])
def test_families_keep_samples_apart(family: str) -> None:
    """Sliding windows and layers without positions among them."""
    config = AutoConfig.for_model(
        family,
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    decoder = AutoModelForCausalLM.from_config(config).eval()
    ids = [torch.randint(3, 60, (length,)) for length in (7, 5, 9)]
    positions = torch.cat([torch.arange(len(sample)) for sample in ids])
    with torch.no_grad():
        joined = decoder(input_ids=torch.cat(ids)[None], position_ids=positions[None], use_cache=False).logits[0]
        alone = [decoder(input_ids=sample[None], use_cache=False).logits[0] for sample in ids]
    torch.testing.assert_close(joined, torch.cat(alone), atol=1e-5, rtol=1e-4)


def test_boundaries_for_flash_attention_are_those_of_transformers() -> None:
    model = build_tiny_model()
    batch = packed(samples_of(model.config))
    ours = flash_attention_boundaries(batch["position_ids"])
    (starts_q, starts_k), (longest_q, longest_k) = prepare_fa_kwargs_from_position_ids(batch["position_ids"])
    assert torch.equal(ours["cu_seq_lens_q"], starts_q)
    assert torch.equal(ours["cu_seq_lens_k"], starts_k)
    assert (ours["max_length_q"], ours["max_length_k"]) == (longest_q, longest_k)
    assert not uses_flash_attention(model)
    flash = PackedCollator(0, flash_attention=True)([samples_of(model.config)])
    assert torch.equal(flash["cu_seq_lens_q"][:-1], (flash["position_ids"][0] == 0).nonzero().flatten())
