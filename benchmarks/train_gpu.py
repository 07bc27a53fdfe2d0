"""Model FLOPs utilisation (MFU) of stage 2 on one GPU: random weights of real sizes, packed rows of 4,096 tokens.

`make gpu` runs it, see `gpu.py`. The language models have the sizes of Llama-3.2-1B and 3B, the tower those of
SigLIP-SO400M/14 at 384 pixels. A step is forward, backward and a fused AdamW update of float32 weights, computed in
bfloat16, as the trainer does on one GPU. MFU is `ModelFlops.total` / (seconds · peak), where the peak is the data
sheet's for dense bfloat16. The profiler tells how the time of one step divides among kinds of kernels.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable
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
"""FLOP/s of dense bfloat16, by a substring of the device's name."""
START, END, IMAGE = 128_256, 128_257, 128_258
NUM_IMAGE_TOKENS = 64
WARMUP, STEPS = (5, 10) if torch.cuda.is_available() else (1, 2)
KINDS = {
    "matrix products": ("gemm", "cutlass", "xmma", "nvjet"),
    "attention": ("flash", "fmha", "attention"),
    "optimizer": ("multi_tensor", "adam"),
    "copies and casts": ("copy", "memcpy", "cast"),
    "losses and softmax": ("softmax", "nll", "cross_entropy"),
    "norms": ("norm",),
}
"""What a kernel is for, by a substring of its name; the first match counts."""


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
    small: bool = False
    """Tiny sizes, to try the program on a CPU."""

    @property
    def row(self) -> int:
        """Tokens of a row."""
        return 256 if self.small else 4096


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOWER = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8}
SMALL_TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
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


def describe(case: Case) -> dict[str, Any]:
    """The columns that say what was run."""
    return {"model": case.size, "rows": case.rows, "recompute": case.recompute, "compiled": case.compiled}


def measure_case(case: Case) -> dict[str, Any]:
    """The row of a case: MFU, tokens per second, peak memory and what the time is spent on.

    Raises:
        SystemExit: if the peak of the GPU is not known.
    """
    model, peak = build_model(case), device_peak()
    attention = str(model.get_decoder().config._attn_implementation)
    batch = make_batch(case, "flash" in attention)
    flops = model_flops(model).total(Work(*count_work(batch, NUM_IMAGE_TOKENS).tolist()))
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-5, fused=True)
    seconds = time_calls(lambda number: train_step(model, batch, optimizer))
    return describe(case) | {
        "attention": attention if attention != "sdpa" else model.packed_kernel,
        "ms": 1e3 * seconds,
        "tokens/s": case.rows * case.row / seconds,
        "MFU %": 100 * flops / seconds / peak,
        "peak GB": peak_gigabytes(),
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
            "max_position_embeddings": case.row,
            **SIZES[case.size],
            **(SMALL if case.small else {}),
        },
        vision_config=TOWER | (SMALL_TOWER if case.small else {}),
        num_image_tokens=NUM_IMAGE_TOKENS,
        image_token_id=IMAGE,
        image_start_token_id=START,
        image_end_token_id=END,
    )
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = MetaMorphForConditionalGeneration(config).train()
    model.model.vision_tower.requires_grad_(False).bfloat16()
    if is_flash_attn_2_available():
        model.set_attn_implementation({"text_config": "flash_attention_2"})
    elif torch.cuda.is_available() and case.recompute != "selective":
        model.packed_kernel = "flex_attention"
    if case.recompute != "none":
        recompute_layers(model, selective=case.recompute == "selective")
    if case.compiled:
        compile_layers(model)
    return model


def make_batch(case: Case, flash_attention: bool) -> dict[str, Any]:
    """Full rows of eight samples (two if small) with one image each: in every second sample, the answer's."""
    generator = torch.Generator().manual_seed(0)
    image = [START, *[IMAGE] * NUM_IMAGE_TOKENS, END]
    samples, per_row = [], 8 if not case.small else 2
    length = case.row // per_row
    for index in range(case.rows * per_row):
        words = torch.randint(0, START, (length - len(image),), generator=generator).tolist()
        ids = torch.tensor([*words[:32], *image, *words[32:]])
        is_answer = torch.arange(length) >= (32 if index % 2 else 32 + len(image))
        sample = {
            "input_ids": ids,
            "labels": ids.masked_fill(~is_answer | (ids == IMAGE), -100),
            "visual_target_mask": is_answer & (ids == IMAGE),
            "pixel_values": torch.randn(1, 3, 384, 384, generator=generator),
        }
        samples.append(sample)
    rows = [samples[start : start + per_row] for start in range(0, len(samples), per_row)]
    return to_device(PackedCollator(0, flash_attention, IMAGE)(rows))


def to_device(value: Any) -> Any:
    """A batch with its tensors on the GPU."""
    if isinstance(value, dict):
        return {name: to_device(item) for name, item in value.items()}
    return value.to(DEVICE) if isinstance(value, torch.Tensor) else value


def device_peak() -> float:
    """FLOP/s of dense bfloat16; 1e12 on a CPU, where MFU means nothing.

    Raises:
        SystemExit: if the peak of the GPU is not known.
    """
    if DEVICE == "cpu":
        return 1e12
    name = torch.cuda.get_device_name()
    peak = next((value for part, value in PEAKS.items() if part in name), None)
    if peak is None:
        sys.exit(f"the peak of {name} is not known: add it to PEAKS in {__file__}")
    return peak


def synchronize() -> None:
    """Wait until the GPU is done."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def peak_gigabytes() -> float:
    """Most memory allocated on the GPU since `time_calls` began."""
    return torch.cuda.max_memory_allocated() / 1e9 if DEVICE == "cuda" else 0.0


def time_calls(call: Callable[[int], Any], steps: int = STEPS) -> float:
    """Mean seconds of a call over `steps`, after `WARMUP` calls that do not count. `call` gets its number."""
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for number in range(WARMUP):
        call(number)
    synchronize()
    start = time.perf_counter()
    for number in range(steps):
        call(number)
    synchronize()
    return (time.perf_counter() - start) / steps


def train_step(
    model: MetaMorphForConditionalGeneration, batch: dict[str, Any], optimizer: torch.optim.Optimizer
) -> None:
    """Forward, backward, update; nothing is read back."""
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = model(**batch).loss
    assert loss is not None
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def kinds_of_kernels(
    model: MetaMorphForConditionalGeneration, batch: dict[str, Any], optimizer: torch.optim.Optimizer
) -> str:
    """Shares of one step's time by kind of kernel, and the share in which the GPU waits."""
    synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as trace:
        start = time.perf_counter()
        train_step(model, batch, optimizer)
        synchronize()
        total = 1e6 * (time.perf_counter() - start)
    shares: dict[str, float] = defaultdict(float)
    for event in trace.events():
        # Annotations, such as that of an optimizer's step, span kernels that are counted by themselves.
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            kernel = event.name.lower()
            kind = next((kind for kind, parts in KINDS.items() if any(part in kernel for part in parts)), "other")
            shares[kind] += event.device_time_total
    shares["waiting"] = max(0.0, total - sum(shares.values()))
    total = sum(shares.values())
    ordered = sorted(shares.items(), key=lambda item: -item[1])
    return ", ".join(f"{kind} {100 * spent / total:.0f} %" for kind, spent in ordered)
