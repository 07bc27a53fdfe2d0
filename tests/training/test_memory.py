"""The estimate of a run's memory: its terms against what PyTorch really keeps, for tiny models on a CPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from training_parts import arguments, make_language_model, make_vision_tower
from transformers import AutoModel, LlamaConfig

from metamorph.models.modeling_metamorph import MetaMorphForConditionalGeneration
from metamorph.models.text_head import MAX_LOGITS
from metamorph.training.build import load_model, resolve_model
from metamorph.training.costs.memory import (
    ENGINES,
    MicroBatch,
    decoder_activations,
    estimate_memory,
    model_sizes,
    optimizer_bytes_of,
)
from metamorph.training.load import build_outline
from metamorph.training.stages import apply_stage, summarise


CONFIG = LlamaConfig(
    hidden_size=128,
    intermediate_size=352,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=64,
)


@contextmanager
def kept_for_backward(model: nn.Module) -> Iterator[dict[int, int]]:
    """Collects storage -> bytes of all that autograd saves inside the block, the model's own weights excepted."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            alive.append(tensor)
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


def measured_activations(
    batch: MicroBatch, *, autocast: bool, dtype: torch.dtype, checkpointing: bool = False, layers: str = "trained"
) -> int:
    """Bytes that a real forward pass of the decoder keeps; autocast's copies of weights are taken off."""
    torch.manual_seed(0)
    decoder = AutoModel.from_config(CONFIG, dtype=dtype).train()
    if layers != "trained":
        decoder.requires_grad_(False)
    if layers == "lora":
        from peft import LoraConfig

        decoder.add_adapter(LoraConfig(r=2, lora_dropout=0.0, target_modules="all-linear"))
        for module in decoder.modules():
            if isinstance(module, nn.Linear) and not module.weight.requires_grad:
                module.to(torch.bfloat16)  # as `store_frozen_matrices` does
    if checkpointing:
        decoder.gradient_checkpointing_enable({"use_reentrant": False})
    inputs = torch.randn(batch.rows, batch.length, CONFIG.hidden_size, dtype=dtype, requires_grad=True)
    mask = torch.zeros(batch.rows, 1, batch.length, batch.length, dtype=dtype) if batch.block_mask else None
    positions = torch.arange(batch.length).repeat(batch.rows, 1)
    with kept_for_backward(decoder) as kept, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        decoder(inputs_embeds=inputs, attention_mask=mask, position_ids=positions, use_cache=False)
    if autocast and mask is not None:
        kept[mask.data_ptr()] = mask.nbytes  # the input itself: autograd keeps a converted copy for each layer
    copied = [p for n, p in decoder.named_parameters() if p.ndim > 1 and p.dtype == torch.float32 and "embed" not in n]
    weights = sum(parameter.numel() for parameter in copied)
    return sum(kept.values()) - (2 * weights if autocast and not checkpointing else 0)


@pytest.mark.parametrize("layers", ["trained", "frozen"])
@pytest.mark.parametrize("block_mask", [False, True])
@pytest.mark.parametrize(
    ("autocast", "dtype", "compute", "residual"),
    [(True, torch.float32, 2, 4), (False, torch.bfloat16, 2, 2), (False, torch.float32, 4, 4)],
    ids=["autocast", "bfloat16", "float32"],
)
def test_activations_are_what_autograd_keeps(
    autocast: bool, dtype: torch.dtype, compute: int, residual: int, block_mask: bool, layers: str
) -> None:
    batch = MicroBatch(rows=2, length=192, images=0, block_mask=block_mask)
    measured = measured_activations(batch, autocast=autocast, dtype=dtype, layers=layers)
    estimate = decoder_activations(CONFIG, batch, compute, residual, layers=layers)
    assert estimate == pytest.approx(measured, rel=0.06)


def test_activations_with_lora() -> None:
    pytest.importorskip("peft")
    batch = MicroBatch(rows=2, length=192, images=0)
    measured = measured_activations(batch, autocast=True, dtype=torch.float32, layers="lora")
    # Dropout's mask has one byte for each input on a GPU, four on a CPU: left out of the comparison.
    inputs = 5 * CONFIG.hidden_size + CONFIG.hidden_size + CONFIG.intermediate_size
    mask = CONFIG.num_hidden_layers * batch.tokens * inputs
    assert decoder_activations(CONFIG, batch, 2, 4, layers="lora") - mask == pytest.approx(measured, rel=0.06)


def test_checkpointing_keeps_the_inputs_of_the_layers() -> None:
    """What the forward pass keeps; the estimate adds one layer, which the backward pass computes again."""
    batch = MicroBatch(rows=2, length=192, images=0)
    measured = measured_activations(batch, autocast=False, dtype=torch.bfloat16, checkpointing=True)
    none, selective, full = (decoder_activations(CONFIG, batch, 2, 2, kind) for kind in ("none", "selective", "full"))
    inputs = CONFIG.num_hidden_layers * batch.tokens * CONFIG.hidden_size * 2
    ends = 2 * batch.tokens * CONFIG.hidden_size * 4
    one_layer = (none - ends) / CONFIG.num_hidden_layers
    assert full == pytest.approx(inputs + ends + one_layer, rel=0.01)
    assert inputs <= measured <= full < selective < none


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`llm` and `tower`, with weights, and an empty data file."""
    folder = tmp_path_factory.mktemp("memory")
    make_language_model(folder / "llm")
    make_vision_tower(folder / "tower")
    (folder / "images").mkdir()
    (folder / "data.jsonl").write_text("")
    return folder


def outline(parts: Path, stage: int, **flags: object) -> MetaMorphForConditionalGeneration:
    model_args, *_ = arguments(parts, parts / "out", stage=stage, from_scratch_connector=True, **flags)
    model = build_outline(model_args, resolve_model(model_args))
    apply_stage(model, model_args)
    return model


@pytest.mark.parametrize("stage", [1, 2])
def test_outline_is_the_model_without_weights(parts: Path, stage: int) -> None:
    model_args, *_ = arguments(parts, parts / "out", stage=stage, from_scratch_connector=True)
    real = load_model(model_args, resolve_model(model_args))
    apply_stage(real, model_args)
    drawn = outline(parts, stage)
    assert {name: (p.shape, p.requires_grad) for name, p in drawn.named_parameters()} == {
        name: (p.shape, p.requires_grad) for name, p in real.named_parameters()
    }
    assert all(parameter.is_meta for parameter in drawn.parameters())
    assert summarise(drawn) == summarise(real)


@pytest.mark.parametrize("stage", [1, 2])
def test_state_is_what_a_step_leaves(parts: Path, stage: int) -> None:
    model_args, *_ = arguments(parts, parts / "out", stage=stage, from_scratch_connector=True)
    model = load_model(model_args, resolve_model(model_args))
    apply_stage(model, model_args)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moments = sum(v.nbytes for state in optimizer.state.values() for v in state.values() if v.ndim)
    estimate = estimate_memory(model, "single", MicroBatch(1, 8, 0), bf16=False, on_gpu=False)
    assert estimate.gradients == sum(parameter.grad.nbytes for parameter in trained)
    assert estimate.optimizer == moments
    assert estimate.weights + estimate.frozen_tower == sum(parameter.nbytes for parameter in model.parameters())
    assert estimate.runtime == estimate.compute_copies == estimate.host == 0


def test_sharding_divides_the_state(parts: Path) -> None:
    model, batch = outline(parts, 2), MicroBatch(1, 64, 1)
    trained = model_sizes(model).trained
    of = {name: estimate_memory(model, name, batch, num_processes=4) for name in ENGINES}
    single = estimate_memory(model, "single", batch)
    assert of["ddp"].gradients == 2 * single.gradients  # and the buckets they are averaged in
    assert of["fsdp2"].weights == of["zero2"].weights == of["zero3"].weights == trained
    for name in ("fsdp2", "zero2", "zero3"):
        assert of[name].optimizer == of["ddp"].optimizer // 4
    buckets = 2 * trained
    assert of["zero2"].gradients == of["zero2_offload"].gradients == of["zero3"].gradients == trained + buckets
    assert of["zero3_offload"].gradients == buckets
    assert of["zero2"].compute_copies == 2 * trained
    assert of["zero3_offload"].host == 5 * trained + 2 * trained // 4 > of["zero2_offload"].host == 4 * trained
    assert of["zero2_offload"].state < of["zero2"].state < of["ddp"].state
    assert of["fsdp2"].total == sum(v for k, v in vars(of["fsdp2"]).items() if k != "host")


def test_logits_of_a_part_of_the_positions(parts: Path) -> None:
    model, batch = outline(parts, 2), MicroBatch(1, 2**20, 1)
    some, every = (estimate_memory(model, "single", batch, all_logits=all_logits) for all_logits in (False, True))
    assert some.logits == 12 * MAX_LOGITS
    assert every.logits == 12 * batch.tokens * model.config.text_config.vocab_size


def test_a_trained_tower_needs_activations_and_state(parts: Path) -> None:
    frozen, trained = outline(parts, 2), outline(parts, 2, freeze_vision=False)
    batch = MicroBatch(1, 64, 4)
    with_frozen, with_trained = (estimate_memory(model, "single", batch) for model in (frozen, trained))
    assert with_trained.frozen_tower == 0 < with_frozen.frozen_tower
    assert with_trained.activations > with_frozen.activations
    with_cache = estimate_memory(frozen, "single", batch, tower_on_gpu=False)
    assert with_cache.frozen_tower == 0
    assert with_frozen.total - with_cache.total == with_frozen.frozen_tower
    assert with_trained.optimizer > with_frozen.optimizer


def test_optimizers_keep_different_amounts() -> None:
    assert [optimizer_bytes_of(name) for name in ("adamw_torch_fused", "adamw_8bit", "adafactor", "lion_32bit")] == [
        8,
        2,
        0,
        4,
    ]


def test_the_state_of_embeddings_is_counted_in_32_bits(parts: Path) -> None:
    model = outline(parts, 2)
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    table = model.get_input_embeddings().weight.numel()
    estimate = estimate_memory(model, "single", MicroBatch(1, 8, 0), optimizer_bytes=optimizer_bytes_of("adamw_8bit"))
    assert estimate.optimizer == 2 * trained + 6 * table


def test_unknown_engine_is_refused(parts: Path) -> None:
    with pytest.raises(ValueError, match="--sharding 'zero9' is unknown: use one of single, ddp"):
        estimate_memory(outline(parts, 1), "zero9", MicroBatch(1, 8, 0))
