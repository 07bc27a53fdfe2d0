"""Our model computes the numbers of the original system: features, embeddings, hidden states, losses, gradients."""

import pytest
import torch
from golden_parts import (
    assert_close,
    expand_placeholders,
    golden_batch,
    golden_model,
    numbers,
    our_name,
    tensors,
)

from metamorph.models.embeddings import attach_new_token_rows
from metamorph.models.vision_tower import concat_blocks, interpolate_tokens, normalize_visual_tokens


pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def model():
    return golden_model()


@pytest.fixture(scope="module")
def batch():
    return golden_batch()


def test_tower_hidden_state_before_the_final_norm(model, batch):
    patches = model.model.vision_tower._encode(batch["pixel_values"])
    assert_close(patches, tensors("micro/vision")["tower_hidden_last"][:4])


def test_visual_tokens(model, batch):
    reference = tensors("micro/vision")
    assert_close(model.get_visual_tokens(batch["pixel_values"]), reference["tower_reduced_normalized"][:4])
    raw = golden_model(normalize_vision=False).get_visual_tokens(batch["pixel_values"])
    assert_close(raw, reference["tower_reduced"][:4])


def test_connector(model):
    reference = tensors("micro/vision")
    assert_close(model.model.mm_projector(reference["tower_reduced_normalized"]), reference["projected"])


@pytest.mark.parametrize(
    ("name", "source", "count", "concat"),
    [
        ("interpolation_729_to_64", "x729", 64, False),
        ("interpolation_729_to_256", "x729", 256, False),
        ("interpolation_64_to_16", "x64", 16, False),
        ("interpolation_64_to_64_untouched", "x64", 64, False),
        ("concat_interpolation_729_to_64", "x729", 64, True),
        ("concat_interpolation_64_to_16", "x64", 16, True),
    ],
)
def test_reductions(name, source, count, concat):
    reference = tensors("reduction")
    tokens = interpolate_tokens(reference[source], count * 4 if concat else count)
    tokens = concat_blocks(tokens) if concat else tokens
    assert_close(tokens, reference[name])
    if f"{name}_normalized" in reference:
        normalized = normalize_visual_tokens(tokens, normalize=True, apply_softmax=False)
        assert_close(normalized, reference[f"{name}_normalized"])


def test_reduction_of_bfloat16_features():
    reference = tensors("reduction")
    tokens = interpolate_tokens(reference["x729"].bfloat16(), 64)
    normalized = normalize_visual_tokens(tokens, normalize=True, apply_softmax=False)
    expected = reference["interpolation_729_to_64_normalized_bf16_input"]
    assert normalized.dtype == expected.dtype == torch.bfloat16
    # The original normalises in bfloat16, ours in float32: equal up to one rounding step of bfloat16.
    assert_close(normalized, expected, tolerance=2**-8)


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_embeddings_and_hidden_states(model, batch, stage):
    reference = tensors(f"micro/{stage}")
    real = batch["attention_mask"].bool()
    assert torch.equal(real, reference["prepared_attention_mask"])
    embeds = model.model.embed(batch["input_ids"], model.get_visual_tokens(batch["pixel_values"]))
    assert_close(embeds[real], reference["inputs_embeds"][real])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    hidden = model.model(**inputs).last_hidden_state
    assert_close(hidden[real], reference["hidden_states"][real])
    assert_close(model(**inputs).logits[real], reference["logits"][real], tolerance=2e-5)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("stage1", {"use_vision_ar": False}),
        ("stage2", {}),
        ("stage2_coef05", {"vision_coef": 0.5}),
        ("stage2_not_normalized", {"normalize_vision": False}),
        ("stage2_softmax", {"normalize_vision": False, "apply_softmax": True}),
        ("stage2_normalized_softmax", {"apply_softmax": True}),
    ],
)
def test_losses(batch, name, overrides):
    output = golden_model(**overrides)(**batch)
    reference = numbers("micro/scalars")["scalars"][name]
    assert output.text_loss.item() == pytest.approx(reference["loss_language"], abs=1e-5)
    assert output.num_text_tokens == 50
    if name == "stage1":
        assert output.visual_loss is None
        return
    # The cosine loss of ours is 1 - cos, the original's -cos.
    shift = 0 if overrides.get("apply_softmax") or not overrides.get("normalize_vision", True) else 1
    assert output.visual_loss.item() == pytest.approx(reference["loss_image_ar"] + shift, abs=1e-5)
    assert output.num_visual_tokens == 32
    coefficient = overrides.get("vision_coef", 1.0)
    assert output.loss.item() == pytest.approx(reference["loss_total"] + shift * coefficient, abs=1e-5)
    if name == "stage2":
        assert output.visual_cosine.item() == pytest.approx(-reference["loss_image_ar"], abs=1e-5)


def test_gradients_of_stage_2(batch):
    model = golden_model()
    model(**batch).loss.backward()
    compared = 0
    for name, reference in tensors("micro/stage2").items():
        if not name.startswith("grad."):
            continue
        gradient = model.get_parameter(our_name(name.removeprefix("grad."))).grad
        assert_close(gradient[: reference.shape[0]], reference)  # without the placeholder's row
        compared += 1
    assert compared == 13
    assert model.get_input_embeddings().weight.grad[-1].eq(0).all()
    norms = numbers("micro/scalars")["scalars"]["stage2"]["grad_norms"]
    for name, norm in norms.items():
        if norm is not None and our_name(name) is not None:
            ours = model.get_parameter(our_name(name)).grad.norm().item()
            assert ours == pytest.approx(norm, abs=1e-5), name


def test_gradients_of_stage_1(batch):
    model = golden_model(use_vision_ar=False)
    model.requires_grad_(False)
    model.model.mm_projector.requires_grad_(True)
    rows = attach_new_token_rows(model)
    model(**batch).loss.backward()
    reference = tensors("micro/stage1")
    for name in ("model.mm_projector.0.weight", "model.mm_projector.2.weight", "model.mm_projector.0.bias"):
        assert_close(model.get_parameter(name).grad, reference[f"grad.{name}"])
    # The original gives every row of the table a gradient; ours only those of the new tokens, and the same one.
    ids = numbers("micro/config")["ids"]
    expected = reference["grad.model.embed_tokens.weight"][[ids["image_start"], ids["image_end"]]]
    assert_close(rows.grad, expected)
    assert model.get_input_embeddings().weight.grad is None


@pytest.mark.parametrize(
    ("case", "images"),
    [("mixed_batch", ["src", "dst", "vqa", "gen", "vqa", "src", "dst", "vqa"]), ("no_answer_image", ["vqa"])],
)
def test_mixed_batches(model, case, images):
    """Rows with none to three images, two of them cut in their text at `model_max_length`."""
    reference = numbers("edge/edge")["cases"][case]
    recorded = {name: tensors("edge/edge")[f"{case}.{name}"] for name in ("input_ids", "labels", "attention_mask")}
    batch = expand_placeholders(recorded, reference["model_max_length"])
    order = ["vqa", "gen", "src", "dst"]
    batch["pixel_values"] = tensors("micro/batch")["images"][[order.index(name) for name in images]]
    real = batch["attention_mask"].bool()
    assert torch.equal(real, tensors("edge/edge")[f"{case}.prepared_attention_mask"])
    embeds = model.model.embed(batch["input_ids"], model.get_visual_tokens(batch["pixel_values"]))
    assert_close(embeds[real], tensors("edge/edge")[f"{case}.inputs_embeds"][real])
    output = model(**batch)
    assert output.text_loss.item() == pytest.approx(reference["loss_language"], abs=1e-5)
    assert output.num_visual_tokens == reference["n_answer_visual"]
    if reference["n_answer_visual"]:
        assert output.visual_loss.item() == pytest.approx(reference["loss_image_ar"] + 1, abs=1e-5)
    else:
        assert output.visual_loss == 0  # R01: the original gives NaN


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_six_optimizer_steps(batch, stage):
    """AdamW, constant learning rate 1e-3, gradients clipped at 1, as the original's trainer does."""
    model = golden_model(use_vision_ar=stage == "stage2").train()
    model.requires_grad_(stage == "stage2")
    model.model.vision_tower.requires_grad_(False)
    model.model.mm_projector.requires_grad_(True)
    model.get_input_embeddings().requires_grad_(True)  # the original trains the full table in stage 1 as well
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
    for reference in numbers("micro/trajectory")["steps"][stage]:
        output = model(**batch)
        assert output.text_loss.item() == pytest.approx(reference["loss_language"], abs=1e-5)
        if stage == "stage2":
            assert output.visual_loss.item() == pytest.approx(reference["loss_image_ar"] + 1, abs=1e-5)
        output.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        assert norm.item() == pytest.approx(reference["grad_norm_before_clip"], abs=1e-5)
        optimizer.step()
        optimizer.zero_grad()
    for name, expected in tensors("micro/trajectory_final").items():
        prefix, _, parameter = name.partition(".")
        if prefix == stage:
            assert_close(model.get_parameter(our_name(parameter)).detach()[: expected.shape[0]], expected)
