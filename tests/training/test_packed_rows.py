"""Packed rows compute what padded rows do: losses of each sample, gradients, and no sample sees another."""

import pytest
import torch
from batch_parts import collate
from model_parts import build_batch, build_tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import create_causal_mask
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids

from metamorph.data.batching.collation import PackedCollator, PaddedCollator, flash_attention_boundaries
from metamorph.models.packed_attention import SampleMask, mask_of_samples
from metamorph.training.engines.attention import check_keeps_samples_apart, flex_attention_fits, uses_flash_attention


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


def packed(samples: list[dict], rows=ROWS, image_token_id: int | None = None) -> dict:
    return PackedCollator(0, image_token_id=image_token_id)([[samples[index] for index in row] for row in rows])


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


@pytest.mark.parametrize("indices", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_equals_padded_in_losses_and_gradients(attention: str, indices: bool) -> None:
    """With indices, SDPA computes each sample by itself."""
    gradients = []
    for is_packed in (True, False):
        model = build_tiny_model()
        model.set_attn_implementation(attention)
        samples, image = samples_of(model.config), model.config.image_token_id
        if is_packed:
            batch = packed(samples, image_token_id=image if indices else None)
        else:
            batch = PaddedCollator(0)(samples)
        output = model(**batch)
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


@pytest.mark.parametrize(
    "family", ["qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "smollm3", "granite", "olmoe"]
)
def test_families_keep_samples_apart(family: str) -> None:
    """Sliding windows, which keep Transformers' mask, and layers without positions among them."""
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
    mask = mask_of_samples(decoder.base_model, [[len(sample) for sample in ids]], positions.device)
    assert isinstance(mask, SampleMask) == (family in ("qwen2", "qwen3", "phi3", "smollm3", "granite", "olmoe"))
    with torch.no_grad():
        alone = torch.cat([decoder(input_ids=sample[None], use_cache=False).logits[0] for sample in ids])
        for given in (None, mask):
            inputs = {"input_ids": torch.cat(ids)[None], "position_ids": positions[None], "attention_mask": given}
            joined = decoder(**inputs, use_cache=False).logits[0]
            torch.testing.assert_close(joined, alone, atol=1e-5, rtol=1e-4)


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


class SeenLengths(TorchDispatchMode):
    """Lengths of the queries in each call of an attention kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.lengths: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "scaled_dot_product" in str(func) and "backward" not in str(func):
            self.lengths.append(args[0].shape[2])
        return func(*args, **(kwargs or {}))


def test_sdpa_computes_no_attention_between_samples() -> None:
    """And the mask is that of Transformers for whatever else reads it."""
    model = build_tiny_model().train()
    batch = packed(samples_of(model.config), image_token_id=model.config.image_token_id)
    with SeenLengths() as seen:
        model(**batch).loss.backward()
    spans = [span for row in batch["indices"]["spans"] for span in row]
    layers = model.config.text_config.num_hidden_layers
    assert seen.lengths[-layers * len(spans) :] == spans * layers

    mask = SampleMask.of([[3, 2, 4], [9]], torch.device("cpu"))
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in mask.spans])
    decoder, embeds = model.get_decoder(), torch.zeros(2, 9, 8)
    theirs = create_causal_mask(decoder.config, embeds, None, None, position_ids=positions)
    assert torch.equal(mask & True, theirs)
    assert mask.shape == theirs.shape


@pytest.mark.parametrize("text_config", [{}, {"model_type": "mistral", "sliding_window": 4}, HYBRID])
def test_padding_on_the_right_needs_no_mask(text_config: dict) -> None:
    """The collator leaves the mask out where `indices` say what is padding."""
    results = []
    for image_token_id in (None, 61):
        model = build_tiny_model(text_config=text_config).train()
        assert model.config.image_token_id == 61
        batch = collate(model.config, False, image_token_id)
        assert ("attention_mask" in batch) == (image_token_id is None)
        output = model(**batch)
        output.loss.backward()
        named = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
        results.append(named | {"loss": output.loss.detach()})
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("autocast", [False, True])
def test_flex_attention_equals_sdpa(autocast: bool) -> None:
    """By its reference implementation: there is no backward pass on a CPU, and compiling takes a minute."""
    model = build_tiny_model()
    batch = packed(samples_of(model.config), image_token_id=model.config.image_token_id)
    losses = []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for attention, kernel in (("sdpa", "sdpa"), ("sdpa", "flex_attention"), ("flex_attention", "sdpa")):
            model.set_attn_implementation({"text_config": attention})
            model.packed_kernel = kernel
            with torch.compiler.set_stance("force_eager"):
                losses.append(model(**batch).loss)
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], rtol=1e-3 if autocast else 1e-6, atol=0)


def test_where_flex_attention_fits() -> None:
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    decoder = build_tiny_model(text_config=sizes).get_decoder()
    assert flex_attention_fits(decoder)
    decoder.config.attention_dropout = 0.1
    assert not flex_attention_fits(decoder)
    assert not flex_attention_fits(build_tiny_model(text_config={**sizes, "head_dim": 8}).get_decoder())
