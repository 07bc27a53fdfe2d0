"""Model FLOPs utilisation (MFU) of stage 2 on one GPU: random weights of real sizes, packed rows of 4,096 tokens.

Run by `python benchmarks/train.py --gpu`. The language models have the sizes of Llama-3.2-1B and 3B, the tower those of
SigLIP-SO400M/14 at 384 pixels. A step is forward, backward and a fused AdamW update on float32 weights with bfloat16
computation, as the trainer does it on one GPU. MFU is `ModelFlops.total` / (seconds · peak); the peak is the data
sheet's for dense bfloat16. The busiest kernels of one step are named, by the profiler.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers.utils import is_flash_attn_2_available

from metamorph.data.batching.collation import PackedCollator
from metamorph.models.configuration_metamorph import MetaMorphConfig
from metamorph.models.modeling_metamorph import MetaMorphForConditionalGeneration
from metamorph.training.costs.flops import Work, count_work, model_flops
from metamorph.training.engines.speed import compile_layers, recompute_layers


PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""FLOP/s of dense bfloat16, by a part of the device's name."""
START, END, IMAGE = 128_256, 128_257, 128_258
NUM_IMAGE_TOKENS, ROW = 64, 4096
WARMUP, STEPS = 5, 10
KINDS = {
    "matrix products": ("gemm", "cutlass", "xmma", "nvjet"),
    "attention": ("flash", "fmha", "attention"),
    "optimizer": ("multi_tensor", "adam"),
    "copies and casts": ("copy", "memcpy", "cast"),
    "losses and softmax": ("softmax", "nll", "cross_entropy"),
    "norms": ("norm",),
}
"""What a kernel is for, by a part of its name; the first that fits counts."""


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    size: str
    """Key of `SIZES`."""
    rows: int
    """Packed rows of a step."""
    recompute: str
    """As `--recompute`."""
    compiled: bool
    """As `--torch_compile`."""


SIZES = {
    "Llama-3.2-1B": {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32},
    "Llama-3.2-3B": {"hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24},
}
CASES = (
    Case("Llama-3.2-1B", 2, "none", False),
    Case("Llama-3.2-1B", 2, "none", True),
    Case("Llama-3.2-1B", 4, "full", True),
    Case("Llama-3.2-1B", 4, "selective", True),
    Case("Llama-3.2-3B", 1, "none", True),
    Case("Llama-3.2-3B", 2, "full", True),
)


def measure_gpu() -> list[dict[str, Any]]:
    """All cases, one after the other.

    Raises:
        SystemExit: if there is no GPU, or its peak is not known.
    """
    if not torch.cuda.is_available():
        sys.exit("--gpu needs a CUDA device, and there is none")
    name = torch.cuda.get_device_name()
    peak = next((value for part, value in PEAKS.items() if part in name), None)
    if peak is None:
        sys.exit(f"the peak of {name} is not known: add it to PEAKS in {__file__}")
    rows = []
    for case in CASES:
        try:
            rows.append(measure_case(case, peak))
        except torch.OutOfMemoryError:
            rows.append({**describe(case), "GPU": name, "result": "out of memory"})
        torch.cuda.empty_cache()
    return [{column: row.get(column, "") for column in max(rows, key=len)} for row in rows]


def describe(case: Case) -> dict[str, Any]:
    """The columns that say what was run."""
    return {"model": case.size, "rows": case.rows, "recompute": case.recompute, "compiled": case.compiled}


def measure_case(case: Case, peak: float) -> dict[str, Any]:
    """MFU, tokens a second, peak memory and what the time is spent on."""
    model = build_model(case)
    batch = make_batch(case.rows, "flash" in str(model.get_decoder().config._attn_implementation))
    flops = model_flops(model).total(Work(*count_work(batch, NUM_IMAGE_TOKENS).tolist()))
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-5, fused=True)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(WARMUP):
        train_step(model, batch, optimizer)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(STEPS):
        train_step(model, batch, optimizer)
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / STEPS
    return {
        **describe(case),
        "GPU": torch.cuda.get_device_name(),
        "attention": model.get_decoder().config._attn_implementation,
        "ms": 1e3 * seconds,
        "tokens/s": case.rows * ROW / seconds,
        "MFU %": 100 * flops / seconds / peak,
        "peak GB": torch.cuda.max_memory_allocated() / 1e9,
        "time": kinds_of_kernels(model, batch, optimizer),
    }


def build_model(case: Case) -> MetaMorphForConditionalGeneration:
    """Random weights on the GPU, as stage 2 trains them: a frozen tower in bfloat16, the rest in float32."""
    config = MetaMorphConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": 128_259,
            "intermediate_size": 8192,
            "num_key_value_heads": 8,
            "tie_word_embeddings": True,
            "max_position_embeddings": ROW,
            **SIZES[case.size],
        },
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 384,
            "patch_size": 14,
        },
        num_image_tokens=NUM_IMAGE_TOKENS,
        image_token_id=IMAGE,
        image_start_token_id=START,
        image_end_token_id=END,
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = MetaMorphForConditionalGeneration(config).train()
    model.model.vision_tower.requires_grad_(False).bfloat16()
    if is_flash_attn_2_available():
        model.set_attn_implementation({"text_config": "flash_attention_2"})
    if case.recompute != "none":
        recompute_layers(model, selective=case.recompute == "selective")
    if case.compiled:
        compile_layers(model)
    return model


def make_batch(num_rows: int, flash_attention: bool) -> dict[str, Any]:
    """Full rows of samples of 512 tokens, with an image each; every second one is drawn."""
    generator = torch.Generator().manual_seed(0)
    image = [START, *[IMAGE] * NUM_IMAGE_TOKENS, END]
    samples = []
    for index in range(num_rows * ROW // 512):
        words = torch.randint(0, START, (512 - len(image),), generator=generator).tolist()
        ids = torch.tensor([*words[:64], *image, *words[64:]])
        is_answer = torch.arange(512) >= (64 if index % 2 else 64 + len(image))
        sample = {
            "input_ids": ids,
            "labels": ids.masked_fill(~is_answer | (ids == IMAGE), -100),
            "visual_target_mask": is_answer & (ids == IMAGE),
            "pixel_values": torch.randn(1, 3, 384, 384, generator=generator),
        }
        samples.append(sample)
    per_row = ROW // 512
    rows = [samples[start : start + per_row] for start in range(0, len(samples), per_row)]
    return to_gpu(PackedCollator(0, flash_attention, IMAGE)(rows))


def to_gpu(value: Any) -> Any:
    """A batch with its tensors on the GPU."""
    if isinstance(value, dict):
        return {name: to_gpu(item) for name, item in value.items()}
    return value.cuda() if isinstance(value, torch.Tensor) else value


def train_step(
    model: MetaMorphForConditionalGeneration, batch: dict[str, Any], optimizer: torch.optim.Optimizer
) -> None:
    """Forward, backward, update; nothing is read back."""
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(**batch).loss
    assert loss is not None
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def kinds_of_kernels(
    model: MetaMorphForConditionalGeneration, batch: dict[str, Any], optimizer: torch.optim.Optimizer
) -> str:
    """Share of the GPU's time in one step by kind of kernel, and the share in which it waits."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as trace:
        start = time.perf_counter()
        train_step(model, batch, optimizer)
        torch.cuda.synchronize()
        total = 1e6 * (time.perf_counter() - start)
    shares: dict[str, float] = defaultdict(float)
    for event in trace.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            kernel = event.name.lower()
            kind = next((kind for kind, parts in KINDS.items() if any(part in kernel for part in parts)), "other")
            shares[kind] += event.device_time_total
    shares["waiting"] = max(0.0, total - sum(shares.values()))
    total = sum(shares.values())
    ordered = sorted(shares.items(), key=lambda item: -item[1])
    return ", ".join(f"{kind} {100 * spent / total:.0f} %" for kind, spent in ordered)
