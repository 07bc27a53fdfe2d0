"""Engines of `--sharding`: their flags and shipped files, the frozen tower, ranks without images."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from model_parts import build_batch, build_tiny_model
from torch import Tensor
from training_parts import arguments, make_language_model, make_records, make_vision_tower

from metamorph.flags.extras import install_command
from metamorph.models.embeddings import attach_new_token_rows
from metamorph.models.modeling_metamorph import MetaMorphForConditionalGeneration
from metamorph.training.arguments import MetaMorphTrainingArguments, RunArguments, sharding
from metamorph.training.arguments.sharding import SHARDINGS, deepspeed_config
from metamorph.training.build import resolve_model
from metamorph.training.costs.memory import MicroBatch, estimate_memory
from metamorph.training.engines.prepare import (
    GPU_SHARE,
    configure_fsdp2,
    consists_of_parameters,
    layer_classes,
    prepare_engine,
    reads_on_first_process,
)
from metamorph.training.engines.weights import FrozenTower
from metamorph.training.load import build_outline
from metamorph.training.stages import apply_stage


SCRIPTS = Path(__file__).parent.parent.parent / "scripts"
ZERO = [name for name in SHARDINGS if name.startswith("zero")]
CPU = torch.device("cpu")


def training_arguments(folder: Path, **flags: object) -> MetaMorphTrainingArguments:
    return MetaMorphTrainingArguments(**{"output_dir": str(folder), "bf16": False, "use_cpu": True, **flags})


@pytest.mark.parametrize("name", ZERO)
def test_shipped_files_are_what_the_flag_means(name: str) -> None:
    assert json.loads((SCRIPTS / f"{name}.json").read_text()) == deepspeed_config(name)


@pytest.mark.parametrize("name", ZERO)
def test_r27_zero_clips_gradients_as_max_grad_norm_says(name: str, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    assert deepspeed_config(name)["gradient_clipping"] == "auto"
    args = training_arguments(tmp_path, sharding=name)
    assert args.hf_deepspeed_config.config["gradient_clipping"] == args.max_grad_norm == 1.0
    stage = args.hf_deepspeed_config.config["zero_optimization"]["stage"]
    assert stage == int(name[4])


def test_accelerate_configurations_name_files_that_exist() -> None:
    for file in SCRIPTS.glob("*.yaml"):
        config = yaml.safe_load(file.read_text())
        assert config["distributed_type"] in ("MULTI_GPU", "FSDP", "DEEPSPEED"), file
        if config["distributed_type"] == "DEEPSPEED":
            assert (SCRIPTS.parent / config["deepspeed_config"]["deepspeed_config_file"]).is_file()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"sharding": "fsdp"}, "--sharding 'fsdp' is unknown: use one of auto, ddp, fsdp2"),
        ({"sharding": "fsdp2"}, "--sharding fsdp2 needs GPUs"),
        ({"dp_replicate": 0}, "--dp_replicate 0 must be 1 or more"),
        ({"dp_replicate": 2, "sharding": "ddp"}, "--dp_replicate 2 has no effect without FSDP2: add --sharding fsdp2"),
        (
            {"sharding": "zero2", "deepspeed": deepspeed_config("zero3")},
            "--sharding zero2 and --deepspeed .* both name an engine",
        ),
        # They would replace the parameter groups and their rates, and a resumed run would keep its old ones.
        *(
            (
                {"deepspeed": deepspeed_config("zero2") | {section: {"type": "AdamW", "params": {"lr": "auto"}}}},
                f"--deepspeed: the section '{section}' is not supported.* use the flags",
            )
            for section in ("optimizer", "scheduler")
        ),
    ],
)
def test_engines_that_are_refused(flags: dict[str, Any], message: str, tmp_path: Path) -> None:
    if flags.keys() == {"deepspeed"}:
        pytest.importorskip("deepspeed")
    with pytest.raises(ValueError, match=message):
        training_arguments(tmp_path, **flags)


def test_missing_deepspeed_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding, "is_deepspeed_available", lambda: False)
    with pytest.raises(ModuleNotFoundError, match=re.escape(install_command("deepspeed"))):
        training_arguments(tmp_path, sharding="zero3")


def outline_of_run(folder: Path, **flags: object) -> tuple[RunArguments, MetaMorphForConditionalGeneration]:
    make_language_model(folder / "llm")
    make_vision_tower(folder / "tower")
    make_records(folder)
    args = RunArguments(*arguments(folder, folder / "out", **flags))
    model = build_outline(args.model, resolve_model(args.model))
    apply_stage(model, args.model)
    return args, model


def test_auto_counts_frozen_matrices_as_they_are_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the dry run does: in 2 bytes in stage 1."""
    args, model = outline_of_run(tmp_path, stage=1, bf16=True)
    assert prepare_engine(args, None) == "single"
    stored, unrounded = (
        estimate_memory(model, "ddp", MicroBatch(1, 1, 0), num_processes=2, matrix_bytes=size).state for size in (2, 4)
    )
    gpu = SimpleNamespace(total_memory=(stored + unrounded) / 2 / GPU_SHARE)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(MetaMorphTrainingArguments, "device", torch.device("cuda"))
    monkeypatch.setattr(MetaMorphTrainingArguments, "world_size", 2)
    assert prepare_engine(args, model) == "ddp"
    gpu.total_memory = 0.99 * stored / GPU_SHARE
    assert prepare_engine(args, model) == "fsdp2"
    assert reads_on_first_process(args.training)
    args.training.fsdp_config["cpu_ram_efficient_loading"] = False
    configure_fsdp2(args.training, ["LlamaDecoderLayer"], read_once=True)
    assert not reads_on_first_process(args.training)


def test_weights_that_are_buffers_cannot_be_sent(tmp_path: Path) -> None:
    """A trained DINOv2 has one; a frozen tower is not sharded."""
    _, model = outline_of_run(tmp_path, stage=1)
    assert consists_of_parameters(model)
    model.model.vision_tower.encoder.register_buffer("mask_token", torch.zeros(1))
    assert consists_of_parameters(model)
    model.model.vision_tower.requires_grad_(True)
    assert not consists_of_parameters(model)


def test_layers_are_sharded_one_by_one(tiny_model: MetaMorphForConditionalGeneration) -> None:
    tiny_model.model.vision_tower.requires_grad_(False)
    assert layer_classes(tiny_model) == ["LlamaDecoderLayer"]
    tiny_model.model.vision_tower.requires_grad_(True)
    assert "SiglipEncoderLayer" in layer_classes(tiny_model)


def tower_state(model: MetaMorphForConditionalGeneration) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if "vision_tower" in name}


@pytest.mark.parametrize("reduction", ["interpolation", "mlpmixer"])
def test_frozen_tower_is_rounded_outside_of_the_tree_and_saved_as_it_was(reduction: str) -> None:
    model = build_tiny_model(image_token_reduction=reduction)
    model.model.vision_tower.encoder.requires_grad_(False)
    before, names = tower_state(model), set(model.state_dict())
    tower = FrozenTower(model, dtype=torch.bfloat16, device=CPU, outside=True, keep=True)

    assert not any("encoder" in name for name, _ in model.named_parameters())
    assert not any("vision_tower.encoder" in name for name, _ in model.named_modules())
    assert model.model.vision_tower.encoder.dtype == torch.bfloat16
    saved = model.state_dict() | tower.state_dict()
    assert set(saved) == names
    assert all(torch.equal(saved[name], value) for name, value in before.items())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(**build_batch(model.config)).loss.isfinite()

    tower.restore()
    after = tower_state(model)
    assert set(after) == set(before)
    assert all(torch.equal(after[name], value) and after[name].dtype == value.dtype for name, value in before.items())


def test_trained_tower_stays_where_it_is(tiny_model: MetaMorphForConditionalGeneration) -> None:
    tower = FrozenTower(tiny_model, dtype=torch.bfloat16, device=CPU, outside=True, keep=True)
    assert tower.state_dict() == {}
    assert tiny_model.model.vision_tower.encoder.dtype == torch.float32
    assert "vision_tower" in dict(tiny_model.model.named_children())


@pytest.mark.parametrize("reduction", ["interpolation", "mlpmixer"])
def test_text_batches_give_every_trained_weight_a_gradient_of_zero(reduction: str) -> None:
    """So that data-parallel processes without images take part in averaging, and change nothing."""
    model = build_tiny_model(image_token_reduction=reduction).train()
    batch = build_batch(model.config, "tt")
    assert batch.get("pixel_values") is None
    model(**batch).loss.backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        if name.startswith(("model.vision_tower.", "model.mm_projector.", "vision_head.")):
            assert not weight.grad.any(), name
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    model.zero_grad()
    model.model.vision_tower.requires_grad_(False)
    model(**batch).loss.backward()
    for name, weight in model.get_decoder().named_parameters(prefix="model.language_model"):
        assert torch.equal(weight.grad, gradients[name]), name


def test_frozen_table_is_read_through_the_module_that_engines_gather(
    tiny_model: MetaMorphForConditionalGeneration,
) -> None:
    """Engines put another tensor instead of the weight of a module; they do not see the table inside as a module."""
    attach_new_token_rows(tiny_model)
    embedding = tiny_model.get_input_embeddings()
    ids = torch.tensor([[5, 6, 7]])
    expected = embedding(ids) * 2
    embedding.weight = torch.nn.Parameter(embedding.weight * 2, requires_grad=False)
    assert torch.equal(embedding(ids), expected)
