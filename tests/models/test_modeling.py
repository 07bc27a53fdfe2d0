"""Losses, gradients, composition and saving of the composite model."""

import copy

import pytest
import torch
from model_parts import GOLDEN, build_batch, build_tiny_model, tiny_config
from processing_parts import build_processor
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from metamorph.models.embeddings import NewTokenEmbedding, attach_new_token_rows, merge_new_token_rows
from metamorph.models.modeling_metamorph import MetaMorphForConditionalGeneration


def gradients(model: nn.Module) -> dict[str, torch.Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def rows(batch: dict, *indices: int) -> dict:
    """Some rows of a batch, without their images."""
    picked = {name: value[list(indices)] for name, value in batch.items() if name != "pixel_values"}
    return picked


def test_r01_batch_without_answer_image_gives_its_text_gradients(tiny_model):
    batch = build_batch(tiny_model.config, "vt")
    tiny_model.train()
    output = tiny_model(**batch)
    assert output.visual_loss.item() == 0.0
    assert output.num_visual_tokens == 0
    assert output.loss.item() == output.text_loss.item()
    output.loss.backward()
    with_head = gradients(tiny_model)

    tiny_model.zero_grad()
    tiny_model.config.use_vision_ar = False
    tiny_model(**batch).loss.backward()
    text_only = gradients(tiny_model)
    for name, gradient in with_head.items():
        if name.startswith("vision_head"):
            # In the graph, with a gradient of exactly zero: ranks with and without answer images stay aligned.
            assert torch.equal(gradient, torch.zeros_like(gradient))
        elif text_only[name] is not None:
            assert torch.equal(gradient, text_only[name]), name


@pytest.mark.parametrize("normalize", [True, False])
def test_r01_also_without_normalisation_and_without_any_image(normalize):
    model = build_tiny_model(normalize_vision=normalize).train()
    output = model(**build_batch(model.config, "tt"))
    output.loss.backward()
    assert torch.isfinite(output.loss)
    assert output.visual_loss.item() == 0.0
    for part in (model.model.mm_projector, model.vision_head):
        assert all(p.grad is not None and not p.grad.any() for p in part.parameters())


@pytest.mark.parametrize("head", ["linear", "mlp", "mlp2x_gelu"])
@pytest.mark.parametrize("reduction", ["interpolation", "concat_interpolation", "mlpmixer", "none"])
def test_r02_every_head_predicts_every_kind_of_visual_token(head, reduction):
    count = 16 if reduction == "none" else 4
    model = build_tiny_model(vision_head_type=head, image_token_reduction=reduction, num_image_tokens=count).train()
    output = model(**build_batch(model.config, "gm"))
    assert output.num_visual_tokens == 2 * count
    output.visual_loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.vision_head.parameters())


def test_r02_disagreeing_images_are_an_error(tiny_model):
    batch = build_batch(tiny_model.config, "gm")
    batch["pixel_values"] = batch["pixel_values"][:2]
    with pytest.raises(ValueError, match="12 image placeholders, but 2 images with 4 visual tokens"):
        tiny_model(**batch)
    batch["pixel_values"] = None
    with pytest.raises(ValueError, match="12 image placeholders, but 0 images"):
        tiny_model(**batch)


@pytest.mark.parametrize(
    ("kind", "depth"), [("linear", 1), ("mlp1x_gelu", 1), ("mlp3x_gelu", 3), ("mlpsoftmax", 2), ("identity", 0)]
)
def test_connectors(kind, depth):
    model = build_tiny_model(mm_projector_type=kind, vision_config={"hidden_size": 32 if kind == "identity" else 24})
    linears = [m for m in model.model.mm_projector.modules() if isinstance(m, nn.Linear)]
    assert len(linears) == depth
    if linears:
        assert (linears[0].in_features, linears[-1].out_features) == (24, 32)
    assert torch.isfinite(model(**build_batch(model.config)).loss)


def test_r05_unnormalised_loss_is_the_mean_absolute_error():
    model = build_tiny_model(normalize_vision=False)
    batch = build_batch(model.config, "gm")
    output = model(**batch)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    hidden = model.model(**inputs)
    targets, predictions, image = [], [], 0
    for row, kind in enumerate("gm"):
        image += kind == "m"  # the edit's source image comes first
        targets.append(hidden.visual_tokens[image])
        image += 1
        positions = batch["visual_target_mask"][row].nonzero().squeeze(1)
        predictions += [model.vision_head(hidden.last_hidden_state[row, p - 1]) for p in positions]
    expected = (torch.cat(targets) - torch.stack(predictions)).abs().mean()
    torch.testing.assert_close(output.visual_loss, expected)


def test_r07_training_computes_logits_of_supervised_positions_only(tiny_model):
    seen = []
    tiny_model.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[0]))
    batch = build_batch(tiny_model.config)
    output = tiny_model(**batch)
    assert seen == [int((batch["labels"] != -100).sum())]
    assert output.logits is None


def test_logits_on_request(tiny_model):
    batch = build_batch(tiny_model.config, "t")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    full = tiny_model(**inputs).logits
    assert full.shape == (1, batch["input_ids"].shape[1], 64)
    torch.testing.assert_close(tiny_model(**inputs, logits_to_keep=2).logits, full[:, -2:])
    torch.testing.assert_close(tiny_model(**batch, logits_to_keep=0).logits, full)


def test_text_loss_equals_the_plain_computation(tiny_model):
    batch = build_batch(tiny_model.config)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    logits = tiny_model(**inputs).logits
    expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    torch.testing.assert_close(tiny_model(**batch).text_loss, expected)


def test_r08_normalizers_make_parts_add_up_to_the_whole(tiny_model):
    """Micro-batches with very different counts, normalised by the counts of the step, give the loss of the step."""
    full = build_batch(tiny_model.config, "vgmt")
    tiny_model.train()
    expected = tiny_model(**full)
    expected.loss.backward()
    expected_gradients = gradients(tiny_model)
    tiny_model.zero_grad()
    normalizers = (expected.num_text_tokens, expected.num_visual_tokens)
    images = full["pixel_values"]
    first = {**rows(full, 0, 1), "pixel_values": images[:2]}
    second = {**rows(full, 2, 3), "pixel_values": images[2:]}
    outputs = [tiny_model(**part, loss_normalizers=normalizers) for part in (first, second)]
    sum(output.loss for output in outputs).backward()
    torch.testing.assert_close(sum(output.text_loss for output in outputs), expected.text_loss)
    torch.testing.assert_close(sum(output.visual_loss for output in outputs), expected.visual_loss)
    for name, gradient in gradients(tiny_model).items():
        if gradient is not None:
            torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=1e-7)


def test_r09_every_parameter_is_used(tiny_model):
    tiny_model.train()
    tiny_model(**build_batch(tiny_model.config)).loss.backward()
    assert [name for name, p in tiny_model.named_parameters() if p.grad is None] == []


def test_r10_batch_without_any_supervision_is_zero_and_not_nan(tiny_model):
    batch = build_batch(tiny_model.config, "vt")
    batch["labels"].fill_(-100)
    tiny_model.train()
    output = tiny_model(**batch)
    output.loss.backward()
    assert output.loss.item() == 0.0
    assert all(not p.grad.any() for p in tiny_model.parameters() if p.grad is not None)


def test_padding_does_not_change_a_row(tiny_model):
    batch = build_batch(tiny_model.config, "vgmt")
    text = rows(batch, 3)
    length = int(text["attention_mask"].sum())
    alone = {name: value[:, :length] for name, value in text.items()}
    padded, short = tiny_model(**text), tiny_model(**alone)
    torch.testing.assert_close(padded.loss, short.loss)


def test_visual_tokens_replace_pixels(tiny_model):
    batch = build_batch(tiny_model.config)
    tokens = tiny_model.get_visual_tokens(batch["pixel_values"])
    encoded = {name: value for name, value in batch.items() if name != "pixel_values"}
    assert torch.equal(tiny_model(**batch).loss, tiny_model(**encoded, visual_tokens=tokens).loss)
    with pytest.raises(ValueError, match="say by visual_tokens_index which images"):
        tiny_model(**batch, visual_tokens=tokens)


def test_some_images_may_be_given_as_visual_tokens(tiny_model):
    batch = build_batch(tiny_model.config)
    pixels = batch["pixel_values"]
    assert len(pixels) > 2
    tokens = tiny_model.get_visual_tokens(pixels)
    index = torch.tensor([0, len(pixels) - 1])
    rest = [place for place in range(len(pixels)) if place not in index]
    mixed = batch | {"pixel_values": pixels[rest], "visual_tokens": tokens[index], "visual_tokens_index": index}
    torch.testing.assert_close(tiny_model(**mixed).loss, tiny_model(**batch).loss)
    swapped = mixed | {"visual_tokens_index": torch.tensor([0, 1])}
    assert not torch.isclose(tiny_model(**swapped).loss, tiny_model(**batch).loss)


def test_image_features_are_what_stands_at_the_placeholders(tiny_model):
    batch = build_batch(tiny_model.config)
    features = tiny_model.get_image_features(batch["pixel_values"])
    assert torch.equal(features.last_hidden_state, tiny_model.get_visual_tokens(batch["pixel_values"]))
    embeds = tiny_model.model.embed(batch["input_ids"], features.last_hidden_state)
    assert torch.equal(
        embeds[batch["input_ids"] == tiny_model.config.image_token_id], features.pooler_output.flatten(0, 1)
    )
    assert torch.equal(tiny_model.model.get_image_features(batch["pixel_values"], return_dict=False)[1], features[1])


def test_a_tuple_is_returned_if_asked_for(tiny_model):
    batch = build_batch(tiny_model.config)
    full = tiny_model(**batch)
    outputs = tiny_model(**batch, return_dict=False)
    assert isinstance(outputs, tuple)
    assert torch.equal(outputs[0], full.loss)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    assert torch.equal(tiny_model(**inputs, return_dict=False)[0], tiny_model(**inputs).logits)
    hidden = tiny_model.model(**inputs, return_dict=False)[0]
    assert torch.equal(hidden, tiny_model.model(**inputs).last_hidden_state)


def test_resized_embeddings_are_those_of_the_whole_model(tmp_path):
    model = build_tiny_model()
    size = model.config.text_config.vocab_size + 7
    batch = build_batch(model.config)
    before = model(**batch, logits_to_keep=0)
    model.resize_token_embeddings(size, mean_resizing=False)
    model.save_pretrained(tmp_path)
    for resized in (model, MetaMorphForConditionalGeneration.from_pretrained(tmp_path)):
        assert resized.config.text_config.vocab_size == size == resized.get_input_embeddings().weight.shape[0]
        after = resized(**batch, logits_to_keep=0)
        assert after.logits.shape[-1] == size
        torch.testing.assert_close(after.logits[..., :-7], before.logits)
        assert torch.isfinite(after.loss)


def test_targets_are_detached():
    """A trained tower must not learn to make its own targets easy."""
    model = build_tiny_model().train()
    model(**build_batch(model.config, "g")).visual_loss.backward()
    # The only answer image is also an input after its own start, so its later tokens reach the loss through the
    # sequence. Without that path (detached input) no gradient may be left.
    model.zero_grad()
    batch = build_batch(model.config, "g")
    model.model.mm_projector.register_forward_pre_hook(lambda module, args: (args[0].detach(),))
    model(**batch).visual_loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.model.vision_tower.parameters())


def test_save_load_same_outputs(tiny_model, tmp_path):
    batch = build_batch(tiny_model.config)
    expected = tiny_model(**batch)
    tiny_model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    for auto in (MetaMorphForConditionalGeneration, AutoModelForImageTextToText):
        loaded, info = auto.from_pretrained(tmp_path, output_loading_info=True)
        assert isinstance(loaded, MetaMorphForConditionalGeneration)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        output = loaded.eval()(**batch)
        assert torch.equal(output.loss, expected.loss)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), type(tiny_model.config))
    assert torch.equal(
        AutoModel.from_pretrained(tmp_path).language_model.norm.weight, tiny_model.model.language_model.norm.weight
    )


def test_r33_load_keeps_device_dtype_and_a_tuned_tower(tmp_path):
    """No forced half precision, no pristine tower reloaded over a tuned one, options can be changed on reload."""
    model = build_tiny_model()
    with torch.no_grad():
        model.model.vision_tower.encoder.embeddings.patch_embedding.weight.add_(1.0)
    folder = tmp_path / "any-name"
    model.save_pretrained(folder)
    loaded = MetaMorphForConditionalGeneration.from_pretrained(folder, use_vision_ar=False, vision_coef=0.25)
    assert loaded.dtype == torch.float32
    name = "model.vision_tower.encoder.embeddings.patch_embedding.weight"
    assert torch.equal(loaded.get_parameter(name), model.get_parameter(name))
    assert not loaded.config.use_vision_ar
    assert loaded.config.vision_coef == 0.25
    model.bfloat16().save_pretrained(tmp_path / "half")
    assert MetaMorphForConditionalGeneration.from_pretrained(tmp_path / "half").dtype == torch.bfloat16


def test_tied_embeddings_stay_tied(tmp_path):
    model = build_tiny_model(text_config={"tie_word_embeddings": True})
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    loaded = MetaMorphForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("tied", [False, True])
def test_new_token_rows(tied):
    model = build_tiny_model(text_config={"tie_word_embeddings": tied})
    batch = build_batch(model.config)
    before = model(**batch).loss
    table = copy.deepcopy(model.get_input_embeddings().weight.detach())
    model.requires_grad_(False)
    new_rows = attach_new_token_rows(model)
    assert isinstance(model.get_input_embeddings(), NewTokenEmbedding)
    assert model.get_input_embeddings().plain.weight.is_meta  # an engine that shards the table can free it
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "model.language_model.embed_tokens.new_rows"
    ]
    torch.testing.assert_close(model(**batch).loss, before)
    optimizer = torch.optim.AdamW([new_rows], lr=0.1, weight_decay=0.1)
    model(**batch).loss.backward()
    assert new_rows.grad.any(dim=1).all()
    optimizer.step()
    attached = model(**batch).loss
    assert attached != before
    merge_new_token_rows(model)
    torch.testing.assert_close(model(**batch).loss, attached)
    moved = (model.get_input_embeddings().weight != table).any(dim=1).nonzero().squeeze(1).tolist()
    assert moved == [62, 63]


def build_language_model(**overrides) -> LlamaForCausalLM:
    config = tiny_config().text_config.to_dict() | {"vocab_size": 382} | overrides
    config.pop("model_type")
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **config))


@pytest.fixture
def tokenizer():
    return PreTrainedTokenizerFast(tokenizer_file=str(GOLDEN / "tokenizer" / "tokenizer.json"))


@pytest.mark.parametrize("after_processor", [False, True])
@pytest.mark.parametrize("vocabulary", [384, 512])
def test_from_parts_adds_rows_at_the_mean(tokenizer, vocabulary, after_processor):
    """The golden tokenizer has 384 tokens and knows start and end; a table that is too large keeps its size.

    A processor that was built first has added the image tokens: their rows must start at the mean all the same.
    """
    if after_processor:
        build_processor(tokenizer)
    language_model = build_language_model(vocab_size=vocabulary)
    known = language_model.get_input_embeddings().weight.detach().clone()
    encoder = AutoModel.from_config(tiny_config().vision_config)
    model = MetaMorphForConditionalGeneration.from_parts(language_model, encoder, tokenizer, num_image_tokens=4)
    assert model.config.image_token_id == tokenizer.convert_tokens_to_ids("<image>") == 384
    assert model.config.image_start_token_id == tokenizer.convert_tokens_to_ids("<image_start>")
    table = model.get_input_embeddings().weight
    assert table.shape[0] == model.lm_head.weight.shape[0] == max(vocabulary, 385)
    assert model.config.text_config.vocab_size == table.shape[0]
    assert torch.equal(table[:384], known[:384])
    torch.testing.assert_close(table[384], known[:384].mean(dim=0))
    assert not any(p.is_meta for p in model.parameters())
    assert torch.isfinite(model(**build_batch(model.config)).loss)


def test_from_parts_in_half_precision(tokenizer):
    language_model = build_language_model(vocab_size=384).bfloat16()
    encoder = AutoModel.from_config(tiny_config().vision_config).bfloat16()
    model = MetaMorphForConditionalGeneration.from_parts(
        language_model, encoder, tokenizer, num_image_tokens=4, image_token_reduction="mlpmixer"
    )
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    batch = build_batch(model.config)
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    assert torch.isfinite(model(**batch).loss)


def test_from_parts_uses_the_parts_weights(tokenizer, tmp_path):
    language_model = build_language_model(vocab_size=384)
    encoder = AutoModel.from_config(tiny_config().vision_config)
    ids = torch.tensor([[1, 5, 9, 12]])
    expected = language_model(ids).logits.detach()
    model = MetaMorphForConditionalGeneration.from_parts(language_model, encoder, tokenizer, num_image_tokens=4)
    torch.testing.assert_close(model(ids).logits[..., :384], expected)
    model.save_pretrained(tmp_path)
    loaded = MetaMorphForConditionalGeneration.from_pretrained(tmp_path)
    batch = build_batch(model.config)
    assert torch.equal(loaded.eval()(**batch).loss, model.eval()(**batch).loss)
