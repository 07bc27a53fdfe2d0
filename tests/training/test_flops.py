"""The formula for model FLOPs against PyTorch's own count of the operations that really ran."""

import pytest
import torch
from model_parts import build_batch, build_tiny_model
from torch.utils.flop_counter import FlopCounterMode

from metamorph.models.losses import sum_dtype
from metamorph.models.modeling_metamorph import MetaMorphForConditionalGeneration
from metamorph.training.arguments import ModelArguments
from metamorph.training.costs.flops import Cost, Work, count_work, model_flops
from metamorph.training.stages import apply_stage


STAGES = {
    "stage 1": {"tune_mm_mlp_adapter": True},
    "stage 2": {},
    "tower trained": {"freeze_vision": False},
    "connector frozen": {"freeze_mm_mlp_adapter": True},
    "head alone": {"freeze_backbone": True, "freeze_mm_mlp_adapter": True},
}
REDUCTIONS = ("interpolation", "mlpmixer")


def staged(flags: dict, **config) -> MetaMorphForConditionalGeneration:
    """A tiny model as one stage trains it; eager attention, whose products the counter sees."""
    model = build_tiny_model(use_vision_ar=not flags.get("tune_mm_mlp_adapter", False), **config).train()
    model.set_attn_implementation("eager")
    args = ModelArguments("somebody/model", from_scratch_connector=True, **flags)
    apply_stage(model, args)
    return model


def eager_work(batch: dict, config) -> Work:
    """What really runs: eager attention computes the masked half and the padding too."""
    work = Work(*count_work(batch, config.num_image_tokens).tolist())
    rows, length = batch["input_ids"].shape
    return work._replace(tokens=rows * length, pairs=rows * length**2)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("flags", STAGES.values(), ids=STAGES.keys())
def test_formula_is_what_pytorch_counts(flags, reduction):
    model = staged(flags, image_token_reduction=reduction)
    batch = build_batch(model.config)
    with FlopCounterMode(display=False) as counter:
        loss = model(**batch).loss
        forward = counter.get_total_flops()
        loss.backward()
    work = eager_work(batch, model.config)
    flops = model_flops(model)
    if flags.get("freeze_backbone"):  # nothing before the head is trained: only its weights have a gradient
        assert flops.token.backward == flops.pair.backward == flops.text_target.backward == 0
    counted = sum(cost.forward * count for cost, count in zip(flops, work, strict=True))
    assert counted == pytest.approx(forward, rel=1e-6)
    assert flops.total(work) == pytest.approx(counter.get_total_flops(), rel=1e-6)


def test_work_of_padded_batch():
    model = build_tiny_model()
    batch = build_batch(model.config, "vgt")
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    work = Work(*count_work(batch, model.config.num_image_tokens).tolist())
    assert work.tokens == sum(lengths)
    assert work.pairs == sum(length * (length + 1) / 2 for length in lengths)
    assert (work.images, work.visual_tokens) == (2, 8)
    assert work.text_targets == (batch["labels"] != -100).sum()
    assert work.visual_targets == 4


def test_work_is_counted_in_integers():
    """Apple's GPUs have no float64: it is summed over a log line on the device, exactly."""
    batch = build_batch(build_tiny_model().config, "vgt")
    assert count_work(batch, 4).dtype == torch.int64
    assert sum_dtype(torch.device("mps")) == torch.float32
    assert sum_dtype(torch.device("cuda")) == torch.float64


def test_features_from_a_cache_cost_no_tower():
    batch = {**build_batch(build_tiny_model().config, "vg"), "visual_tokens": torch.zeros(2, 4, 24)}
    del batch["pixel_values"]
    work = Work(*count_work(batch, 4).tolist())
    assert (work.images, work.visual_tokens) == (0, 8)


def test_packed_batch_is_counted_by_its_samples():
    batch = {"labels": torch.full((1, 6), -100), "position_ids": torch.tensor([[0, 1, 2, 0, 1, 0]])}
    assert count_work(batch, 4).tolist()[:2] == [6, 3 * 4 / 2 + 2 * 3 / 2 + 1]
    batch["indices"] = {"sample_lengths": torch.tensor([3, 2])}  # the last position is padding
    assert count_work(batch, 4).tolist()[:2] == [5, 9]


def test_meta_model_of_large_sizes_needs_no_memory():
    """Llama-3.1-8B: 7.5 G weights in products besides embeddings, so 2 · 7.5 G FLOPs for a token forward."""
    from metamorph.models.configuration_metamorph import MetaMorphConfig

    config = MetaMorphConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": 128258,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        },
        vision_config={"model_type": "siglip_vision_model", "image_size": 384, "patch_size": 14},
        image_token_id=128256,
    )
    with torch.device("meta"):
        flops = model_flops(MetaMorphForConditionalGeneration(config))
    products = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    assert flops.token == Cost(2 * products, 4 * products)
    assert flops.text_target.forward == 2 * 4096 * 128258
