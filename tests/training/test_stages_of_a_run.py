"""Stage 1 and stage 2: what moves, what stays bit-identical, and how one hands over to the other."""

import json
from pathlib import Path

import pytest
import torch
from family_parts import save_vision_model
from safetensors.torch import load_file
from training_parts import arguments, make_language_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from metamorph.models.connector import CONNECTOR_FILE
from metamorph.models.embeddings import NewTokenEmbedding
from metamorph.models.modeling_metamorph import MetaMorphForConditionalGeneration
from metamorph.models.processing_metamorph import MetaMorphProcessor
from metamorph.models.vision_tower import load_vision_encoder
from metamorph.training.arguments import ModelArguments
from metamorph.training.build import load_model, resolve_model
from metamorph.training.optimizer import keep_embeddings_in_32_bits
from metamorph.training.run import TrainResult, run_training


pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def stage_1(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return run_training(*arguments(parts, tmp_path_factory.mktemp("stage1"), stage=1))


@pytest.fixture(scope="module")
def stage_2(parts: Path, stage_1: TrainResult, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    folder = tmp_path_factory.mktemp("stage2")
    return run_training(*arguments(parts, folder, stage=2, pretrain_mm_mlp_adapter=stage_1.output_dir))


def encoder_weights(model: MetaMorphForConditionalGeneration) -> dict[str, torch.Tensor]:
    return model.model.vision_tower.encoder.state_dict()


def original_encoder(parts: Path) -> dict[str, torch.Tensor]:
    return load_vision_encoder(str(parts / "tower")).state_dict()


def test_stage_1_leaves_every_other_weight_bit_identical(parts: Path, stage_1: TrainResult) -> None:
    trained = stage_1.model.state_dict()
    original = AutoModelForCausalLM.from_pretrained(parts / "llm").state_dict()
    vocabulary = original["lm_head.weight"].shape[0]
    for name, weight in original.items():
        ours = name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name
        if name == "model.embed_tokens.weight":
            continue
        assert torch.equal(trained[ours][: weight.shape[0]] if name == "lm_head.weight" else trained[ours], weight), (
            name
        )
    table = trained["model.language_model.embed_tokens.weight"][:vocabulary]
    moved = (table != original["model.embed_tokens.weight"]).any(dim=1).nonzero().flatten().tolist()
    config = stage_1.model.config
    assert moved == [config.image_start_token_id, config.image_end_token_id]
    tower = original_encoder(parts)
    for name, weight in encoder_weights(stage_1.model).items():
        assert torch.equal(weight, tower[name]), name


def test_8_bit_optimizer_keeps_the_state_of_embeddings_in_32_bits(parts: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="needs the extra lora")
    found: dict[str, torch.dtype] = {}

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
            for name, weight in model.named_parameters():
                if "state1" in optimizer.state.get(weight, {}):
                    found[name] = optimizer.state[weight]["state1"].dtype

    flags = {"optim": "adamw_bnb_8bit", "max_steps": 1, "from_scratch_connector": True}
    run_training(*arguments(parts, tmp_path / "out", stage=2, **flags), callbacks=[Look()])
    assert found["lm_head.weight"] == torch.uint8
    assert found["model.language_model.embed_tokens.weight"] == torch.float32


def test_8_bit_optimizer_keeps_the_state_of_new_rows_in_32_bits() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs the extra lora")
    rows = NewTokenEmbedding(torch.nn.Embedding(8, 4096), [6, 7])
    optimizer = bitsandbytes.optim.AdamW8bit([rows.new_rows])
    keep_embeddings_in_32_bits(rows)
    rows(torch.tensor([[6, 7]])).sum().backward()
    optimizer.step()
    assert optimizer.state[rows.new_rows]["state1"].dtype == torch.float32


def test_stage_1_trains_the_connector(parts: Path, stage_1: TrainResult) -> None:
    args = arguments(parts, Path(stage_1.output_dir), stage=1)
    torch.manual_seed(args[2].seed)  # as the run did
    start = load_model(args[0], resolve_model(args[0])).model.mm_projector.state_dict()
    for name, weight in stage_1.model.model.mm_projector.state_dict().items():
        assert not torch.equal(weight, start[name]), name


def test_r30_stage_1_writes_two_rows_not_the_table(stage_1: TrainResult) -> None:
    tensors = load_file(Path(stage_1.output_dir) / CONNECTOR_FILE)
    hidden = stage_1.model.config.text_config.hidden_size
    assert set(tensors) == {f"mm_projector.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")} | {"new_rows"}
    assert tensors["new_rows"].shape == (2, hidden)
    assert not list(Path(stage_1.output_dir).glob("model*.safetensors"))


def test_connector_reaches_stage_2(parts: Path, stage_1: TrainResult, tmp_path: Path) -> None:
    model_args, _, _ = arguments(parts, tmp_path, stage=2, pretrain_mm_mlp_adapter=stage_1.output_dir)
    model = load_model(model_args, resolve_model(model_args))
    for name, weight in stage_1.model.model.mm_projector.state_dict().items():
        assert torch.equal(model.model.mm_projector.state_dict()[name], weight), name
    rows = [model.config.image_start_token_id, model.config.image_end_token_id]
    ours, theirs = model.get_input_embeddings().weight, stage_1.model.get_input_embeddings().weight
    assert torch.equal(ours[rows], theirs[rows])


def test_stage_2_trains_all_but_the_tower(parts: Path, stage_1: TrainResult, stage_2: TrainResult) -> None:
    before, after = stage_1.model.state_dict(), stage_2.model.state_dict()
    moved = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    tower = {name for name in after if name.startswith("model.vision_tower.")}
    assert moved == set(after) - tower
    original = original_encoder(parts)
    for name, weight in encoder_weights(stage_2.model).items():
        assert torch.equal(weight, original[name]), name


def test_stage_2_result_opens_and_computes_the_same(stage_2: TrainResult) -> None:
    model = MetaMorphForConditionalGeneration.from_pretrained(stage_2.output_dir)
    processor = MetaMorphProcessor.from_pretrained(stage_2.output_dir)
    for name, weight in stage_2.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name
    encoded = processor.encode_conversation([{"role": "user", "content": "Hello"}], add_generation_prompt=True)
    ids = encoded.input_ids[None]
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, stage_2.model.eval()(ids).logits)
    assert model.generation_config.eos_token_id == processor.end_of_turn_token_ids
    assert "use_cache" not in json.loads((Path(stage_2.output_dir) / "config.json").read_text())


def test_r33_flags_asked_for_on_reload_are_honoured(parts: Path, stage_2: TrainResult, tmp_path: Path) -> None:
    def reload(**flags: object) -> MetaMorphForConditionalGeneration:
        model_args, _, _ = arguments(parts, tmp_path, stage=2, model_name_or_path=stage_2.output_dir, **flags)
        return load_model(model_args, resolve_model(model_args))

    kept = reload().config
    assert (kept.use_vision_ar, kept.vision_coef) == (True, 1.0)
    changed = reload(use_vision_ar=False, vision_coef=0.25).config
    assert (changed.use_vision_ar, changed.vision_coef) == (False, 0.25)
    with pytest.raises(ValueError, match=r"--num_image_tokens 9 contradicts .* trained with 4"):
        reload(num_image_tokens=9)
    with pytest.raises(ValueError, match=r"--num_image_tokens 64 contradicts .* trained with 4"):  # the flag's default
        reload(num_image_tokens=64)
    with pytest.raises(ValueError, match=r"--apply_softmax True contradicts .* trained with False"):
        reload(apply_softmax=True)
    other = save_vision_model(tmp_path / "other", "clip")
    with pytest.raises(ValueError, match=r"clip_vision_model\) contradicts .* \(model_type siglip_vision_model\)"):
        reload(vision_tower=other)


def test_r33_flags_not_given_on_reload_are_the_models(parts: Path, tmp_path: Path) -> None:
    first = arguments(parts, tmp_path / "first", stage=2, from_scratch_connector=True, version="llama3_original")
    resolve_model(first[0], "pad").processor.save_pretrained(tmp_path / "first")
    load_model(first[0], resolve_model(first[0])).save_pretrained(tmp_path / "first")
    model_args = ModelArguments(model_name_or_path=str(tmp_path / "first"))
    spec = resolve_model(model_args)
    assert (spec.config.num_image_tokens, spec.config.version) == (4, "llama3_original")
    assert spec.processor.image_aspect_ratio == "pad"
    assert resolve_model(model_args, "square").processor.image_aspect_ratio == "square"


def test_r33_image_aspect_ratio_of_a_finished_model_can_be_changed(
    parts: Path, stage_2: TrainResult, tmp_path: Path
) -> None:
    flags = {"model_name_or_path": stage_2.output_dir, "max_steps": 1}
    padded = run_training(*arguments(parts, tmp_path / "pad", stage=2, image_aspect_ratio="pad", **flags))
    assert padded.processor.image_aspect_ratio == "pad"
    assert MetaMorphProcessor.from_pretrained(padded.output_dir).image_aspect_ratio == "pad"


def test_r33_tuned_tower_survives_reload(parts: Path, stage_2: TrainResult, tmp_path: Path) -> None:
    flags = {"model_name_or_path": stage_2.output_dir, "freeze_vision": False}
    tuned = run_training(*arguments(parts, tmp_path / "tuned", stage=2, max_steps=2, warmup_ratio=0, **flags))
    original = original_encoder(parts)
    assert all(not torch.equal(w, original[n]) for n, w in encoder_weights(tuned.model).items() if n.endswith("weight"))
    again = arguments(parts, tmp_path / "again", stage=2, model_name_or_path=tuned.output_dir)
    reloaded = load_model(again[0], resolve_model(again[0]))
    for name, weight in encoder_weights(tuned.model).items():
        assert torch.equal(encoder_weights(reloaded)[name], weight), name


def test_frozen_backbone_and_connector_stay_bit_identical(parts: Path, stage_1: TrainResult, tmp_path: Path) -> None:
    flags = {"pretrain_mm_mlp_adapter": stage_1.output_dir, "freeze_backbone": True, "freeze_mm_mlp_adapter": True}
    result = run_training(*arguments(parts, tmp_path, stage=2, max_steps=2, warmup_ratio=0, **flags))
    after = result.model.state_dict()
    before = stage_1.model.state_dict()
    moved = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert moved == {name for name in after if name.startswith("vision_head.")}


def test_stage_1_with_tied_embeddings(parts: Path, tmp_path: Path) -> None:
    """The head shares the table: only the two new rows of the shared weight may move."""
    folder = make_language_model(tmp_path / "tied", tie_word_embeddings=True)
    result = run_training(*arguments(parts, tmp_path / "out", stage=1, model_name_or_path=str(folder)))
    assert result.model.lm_head.weight is result.model.get_input_embeddings().weight
    original = AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight
    table = result.model.get_input_embeddings().weight[: original.shape[0]]
    moved = (table != original).any(dim=1).nonzero().flatten().tolist()
    assert moved == [result.model.config.image_start_token_id, result.model.config.image_end_token_id]


def test_new_tokens_start_at_the_mean_row(parts: Path, tmp_path: Path) -> None:
    """The processor adds the missing image tokens first; the model must still initialise their rows."""
    tokenizer = AutoTokenizer.from_pretrained(parts / "llm")
    model_args, _, _ = arguments(parts, tmp_path, stage=1)
    spec = resolve_model(model_args)
    model = load_model(model_args, spec)
    placeholder = spec.processor.image_tokens.image
    assert placeholder not in tokenizer.get_vocab().values()
    assert model.config.image_token_id == placeholder
    table = model.get_input_embeddings().weight
    torch.testing.assert_close(table[placeholder], table[: len(tokenizer)].mean(dim=0))
