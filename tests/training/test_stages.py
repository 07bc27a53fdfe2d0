"""What each stage trains, and at which learning rate."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, SiglipVisionConfig, SiglipVisionModel

from metamorph.models.modeling_metamorph import MetaMorphForConditionalGeneration
from metamorph.training.arguments import MetaMorphTrainingArguments, ModelArguments
from metamorph.training.lora import store_frozen_matrices
from metamorph.training.optimizer import check_optimizer, format_summary, learning_rates, module_of, optimizer_groups
from metamorph.training.stages import apply_stage


TOKENIZER = Path(__file__).parent.parent / "golden" / "tokenizer"


def build(**config: object) -> MetaMorphForConditionalGeneration:
    torch.manual_seed(0)
    text = LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=384)
    vision = SiglipVisionConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=4
    )
    return MetaMorphForConditionalGeneration.from_parts(
        LlamaForCausalLM(text),
        SiglipVisionModel(vision),
        AutoTokenizer.from_pretrained(TOKENIZER),
        **{"num_image_tokens": 4, **config},
    )


@pytest.fixture
def model_args(tmp_path: Path):
    """Builds ModelArguments whose paths exist."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')

    def make(**flags: object) -> ModelArguments:
        defaults = {"vision_tower": str(tmp_path), "from_scratch_connector": True}
        return ModelArguments(model_name_or_path=str(tmp_path), **{**defaults, **flags})

    return make


def trained_modules(model: torch.nn.Module) -> set[str]:
    return {module_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_stage_1_trains_connector_and_new_rows_only(model_args) -> None:
    model = build(use_vision_ar=False)
    apply_stage(model, model_args(tune_mm_mlp_adapter=True))
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    connector = {name for name in trained if name.startswith("model.mm_projector.")}
    assert set(trained) - connector == {"model.language_model.embed_tokens.new_rows"}
    assert len(connector) == 4
    # R30: two rows, not the table, have gradients and optimizer state.
    assert trained["model.language_model.embed_tokens.new_rows"] == 2 * 16


def test_stage_1_with_visual_loss_trains_the_head_too(model_args) -> None:
    model = build(use_vision_ar=True)
    apply_stage(model, model_args(tune_mm_mlp_adapter=True, use_vision_ar=True))
    assert trained_modules(model) == {"mm_projector", "vision_head"}


@pytest.mark.parametrize(
    ("flags", "modules"),
    [
        ({}, {"language_model", "mm_projector", "vision_head"}),
        ({"freeze_vision": False}, {"language_model", "mm_projector", "vision_head", "vision_tower"}),
        ({"freeze_backbone": True}, {"mm_projector", "vision_head"}),
        ({"freeze_mm_mlp_adapter": True}, {"language_model", "vision_head"}),
    ],
)
def test_stage_2_policies(flags: dict[str, bool], modules: set[str], model_args) -> None:
    model = build()
    summary = apply_stage(model, model_args(**flags))
    assert trained_modules(model) == modules
    assert {line.module for line in summary if line.trainable} == modules
    assert sum(line.trainable + line.frozen for line in summary) == sum(p.numel() for p in model.parameters())


def test_without_visual_loss_the_head_is_frozen(model_args) -> None:
    model = build(use_vision_ar=False)
    apply_stage(model, model_args(use_vision_ar=False))
    assert trained_modules(model) == {"language_model", "mm_projector"}


def test_nothing_to_train_is_an_error(model_args) -> None:
    model = build(use_vision_ar=False)
    with pytest.raises(ValueError, match=r"nothing is left to train.*--freeze_backbone"):
        apply_stage(model, model_args(freeze_backbone=True, freeze_mm_mlp_adapter=True, use_vision_ar=False))


@pytest.mark.parametrize(("stage", "halved"), [(1, True), (2, False)])
def test_frozen_matrices_on_a_gpu_are_halved_and_compute_the_same(stage: int, halved: bool, model_args) -> None:
    """In stage 2 the result contains a frozen backbone, so it is not rounded."""
    flags = {"tune_mm_mlp_adapter": True} if stage == 1 else {"freeze_backbone": True}
    model, args = build(use_vision_ar=stage == 2).train(), model_args(**flags)
    apply_stage(model, args)
    training = SimpleNamespace(use_cpu=False, deepspeed=None)
    frozen = [layer.mlp.down_proj.weight for layer in model.get_decoder().layers]
    ids = torch.arange(1, 30)[None]
    losses = []
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(model(input_ids=ids, labels=ids).loss)
        store_frozen_matrices(model, SimpleNamespace(model=args, training=training, compute_dtype=torch.bfloat16))
    assert losses[0] == losses[1]
    assert {weight.dtype for weight in frozen} == {torch.bfloat16 if halved else torch.float32}
    assert model.get_decoder().norm.weight.dtype == torch.float32


@pytest.mark.parametrize("name", ["adafactor", "adagrad", "adamw_bnb_8bit"])
def test_optimizers_that_fail_on_shards_are_refused(name: str, tmp_path: Path) -> None:
    args = MetaMorphTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, optim=name, learning_rate=1e-3
    )
    check_optimizer(args)
    args.fsdp = True
    with pytest.raises(ValueError, match=rf"--optim {name} is not known to work with FSDP2.*use one of adamw_torch, "):
        check_optimizer(args)


def test_token_mixer_is_trained_with_the_connector(model_args) -> None:
    model = build(image_token_reduction="mlpmixer")
    apply_stage(model, model_args(tune_mm_mlp_adapter=True, image_token_reduction="mlpmixer"))
    assert all(p.requires_grad for p in model.model.vision_tower.reduction.parameters())
    assert not any(p.requires_grad for p in model.model.vision_tower.encoder.parameters())


def test_r24_every_module_has_its_own_rate_at_once(model_args, tmp_path: Path) -> None:
    model = build()
    apply_stage(model, model_args(freeze_vision=False))
    args = MetaMorphTrainingArguments(
        output_dir=str(tmp_path / "out"),
        learning_rate=1e-3,
        mm_projector_lr=2e-3,
        vision_lr=3e-3,
        vision_head_lr=4e-3,
        weight_decay=0.1,
        use_cpu=True,
    )
    vectors = {name for name, parameter in model.named_parameters() if parameter.ndim < 2}
    found = optimizer_groups(model, module_of, learning_rates(args), args.weight_decay, vectors)
    groups = {group["name"]: group for group in found}
    assert {name: group["lr"] for name, group in groups.items()} == {
        "language_model": 1e-3,
        "language_model_no_decay": 1e-3,
        "mm_projector": 2e-3,
        "mm_projector_no_decay": 2e-3,
        "vision_head": 4e-3,
        "vision_head_no_decay": 4e-3,
        "vision_tower": 3e-3,
        "vision_tower_no_decay": 3e-3,
    }
    assert all(group["weight_decay"] == (0 if "no_decay" in name else 0.1) for name, group in groups.items())
    grouped = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_table_of_what_is_trained(model_args, tmp_path: Path) -> None:
    args = MetaMorphTrainingArguments(output_dir=str(tmp_path / "out"), learning_rate=1e-3, mm_projector_lr=2e-3)
    table = format_summary(apply_stage(build(), model_args()), args)
    rows = {line.split()[0]: line.split()[1:] for line in table.splitlines()[1:]}
    assert rows["mm_projector"][-1] == "0.002"
    assert rows["vision_tower"][0] == "0"
    assert rows["vision_tower"][-1] == "-"
