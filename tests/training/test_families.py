"""Other language models and other vision towers than Llama and SigLIP go through both stages and decode."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from family_parts import save_language_model, save_vision_model, write_records
from PIL import Image
from training_parts import training_lines

from metamorph.models.modeling_metamorph import MetaMorphForConditionalGeneration
from metamorph.models.processing_metamorph import MetaMorphProcessor
from metamorph.training.arguments import DataArguments, MetaMorphTrainingArguments, ModelArguments
from metamorph.training.run import TrainResult, run_training


pytestmark = pytest.mark.integration


FAMILIES = [
    ("qwen2", "clip", "chatml"),
    ("qwen3", "dinov2", "auto"),
    ("mistral", "siglip2", "auto"),
    ("smollm", "siglip", "chatml"),
]


@pytest.mark.parametrize(("language", "tower", "version"), FAMILIES, ids=[f"{a}-{b}" for a, b, _ in FAMILIES])
def test_family_trains_and_decodes(language: str, tower: str, version: str, tmp_path: Path) -> None:
    base = {
        "model_name_or_path": save_language_model(tmp_path / "language", language),
        "vision_tower": save_vision_model(tmp_path / "tower", tower),
        "version": version,
        "num_image_tokens": 4,
    }
    records, images = write_records(tmp_path / "data")
    data = DataArguments(data_path=records, image_folder=images, model_max_length=128)

    stage1 = run_training(ModelArguments(**base, tune_mm_mlp_adapter=True), data, arguments(tmp_path / "stage1"))
    assert_losses_are_finite(stage1)
    connector = ModelArguments(**base, pretrain_mm_mlp_adapter=stage1.output_dir)
    stage2 = run_training(connector, data, arguments(tmp_path / "stage2"))
    assert_losses_are_finite(stage2)
    assert all("visual_loss" in line for line in training_lines(stage2))

    model = MetaMorphForConditionalGeneration.from_pretrained(stage2.output_dir).eval()
    processor = MetaMorphProcessor.from_pretrained(stage2.output_dir)
    assert_same_weights(stage2.model, model)
    if language == "smollm":
        assert model.lm_head.weight is model.get_input_embeddings().weight
    assert_answers_about_an_image(model, processor)
    assert_draws_whole_images(model, processor)


def test_a_mixture_of_experts_is_balanced_while_it_trains(tmp_path: Path) -> None:
    """The logged loss, over micro-batches and packed rows, is the sum of its logged parts."""
    language = save_language_model(tmp_path / "language", "mixtral")
    config = json.loads((tmp_path / "language" / "config.json").read_text())
    (tmp_path / "language" / "config.json").write_text(json.dumps({**config, "router_aux_loss_coef": 0.5}))
    base = {"model_name_or_path": language, "vision_tower": save_vision_model(tmp_path / "tower", "siglip")}
    flags = ModelArguments(**base, version="chatml", num_image_tokens=4, from_scratch_connector=True)
    records, images = write_records(tmp_path / "data")
    data = DataArguments(data_path=records, image_folder=images, model_max_length=128)
    result = run_training(flags, data, arguments(tmp_path / "out"))
    for line in training_lines(result):
        assert line["aux_loss"] >= 1  # 2 of 4 experts for each token: 2 if all are used alike
        expected = line["text_loss"] + line["visual_loss"] + 0.5 * line["aux_loss"]
        assert math.isclose(line["loss"], expected, rel_tol=1e-3)


def arguments(output_dir: Path) -> MetaMorphTrainingArguments:
    """Four steps of two micro-batches, in float32."""
    return MetaMorphTrainingArguments(
        output_dir=str(output_dir),
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        bf16=False,
    )


def assert_losses_are_finite(result: TrainResult) -> None:
    lines = training_lines(result)
    assert len(lines) == 4
    assert all(math.isfinite(line["loss"]) and line["text_loss"] > 0 for line in lines)


def assert_same_weights(expected: torch.nn.Module, loaded: torch.nn.Module) -> None:
    loaded_weights = loaded.state_dict()
    for name, weight in expected.state_dict().items():
        assert torch.equal(weight, loaded_weights[name]), name


def assert_answers_about_an_image(model: MetaMorphForConditionalGeneration, processor: MetaMorphProcessor) -> None:
    messages = [{"role": "user", "content": "<image>\nwhat is shown ?"}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = processor(text=text, images=[Image.new("RGB", (40, 30), "red")], return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=5, do_sample=False, allow_images=False)
    prompt = inputs["input_ids"].shape[1]
    assert 1 <= output.sequences.shape[1] - prompt <= 5
    assert output.visual_tokens.shape[0] == 0


def assert_draws_whole_images(model: MetaMorphForConditionalGeneration, processor: MetaMorphProcessor) -> None:
    """Begins an image itself; then the grammar must complete it, cached as uncached."""
    messages = [{"role": "user", "content": "draw a red square"}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = processor(text=text + "<image_start>", return_tensors="pt")
    prompt = inputs["input_ids"].shape[1]
    config = model.config
    cached = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    uncached = model.generate(**inputs, max_new_tokens=8, do_sample=False, use_cache=False)
    answer = cached.sequences[0, prompt:].tolist()
    assert answer[:5] == [config.image_token_id] * 4 + [config.image_end_token_id]
    assert cached.visual_tokens.shape == (1, 4, config.vision_feature_size)
    assert torch.equal(cached.sequences, uncached.sequences)
    torch.testing.assert_close(cached.visual_tokens, uncached.visual_tokens, atol=1e-4, rtol=0)
    if config.normalize_vision:
        torch.testing.assert_close(cached.visual_tokens.norm(dim=-1), torch.ones(1, 4))
