"""Time and memory of a training step, compared with a straightforward implementation of the same step.

    OMP_NUM_THREADS=1 python benchmarks/train.py --output benchmarks/results/train.json

On a CPU (one thread, float32): one optimizer step of stage 2 on the same weights and the same samples, by the
reference in `straightforward_step` and by the package, each in a separate process to measure its peak memory.
Losses must agree.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data import machine, resident_megabytes
from metamorph.data.batching.collation import PackedCollator, PaddedCollator
from metamorph.models.configuration_metamorph import MetaMorphConfig
from metamorph.models.modeling_metamorph import MetaMorphForConditionalGeneration
from metamorph.models.vision_tower import normalize_visual_tokens
from metamorph.training.costs.flops import Work, count_work, model_flops


START, END, IMAGE = 1, 2, 3
NUM_IMAGE_TOKENS = 64
LLAMA3_VOCABULARY = 128_258
"""Llama-3's tokens, and `<image_start>` and `<image_end>`."""
SAMPLES = ((256, 256, 0, 0), (40, 24, 1, 0), (30, 70, 1, 0), (24, 8, 0, 1), (60, 10, 1, 1), (120, 90, 0, 0))
"""Of each: tokens of the question, tokens of the answer, images in the question, images in the answer."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a small model."""

    title: str
    """Description."""
    vocabulary: int
    """Rows of the embedding table, which is tied to `lm_head` as in Llama-3.2."""
    layers: int
    """Layers of the decoder."""


SHAPES = {
    "llama3-vocabulary": Shape("vocabulary of Llama-3", LLAMA3_VOCABULARY, 6),
    "llama-1b-proportions": Shape("`lm_head` of the share that it has in Llama-3.2-1B", 14_336, 8),
}
VARIANTS = ("reference", "padded", "packed", "padded, feature cache")


def main() -> None:
    """Run all parts, print a table and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/train.json"), help="JSON file to write")
    parser.add_argument(
        "--repeats", type=int, default=3, help="steps of which the fastest counts (default: %(default)s)"
    )
    flags = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measured for name in SHAPES for measured in measure_shape(name, flags.repeats)]
    report = {"machine": machine(), "rows": rows}
    flags.output.parent.mkdir(parents=True, exist_ok=True)
    flags.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report["machine"], indent=2))
    columns = list(rows[0])
    print("\n| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(cell(row[name]) for name in columns) + " |")


def cell(value: Any) -> str:
    """A value for the table."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def measure_shape(name: str, repeats: int) -> list[dict[str, Any]]:
    """All variants of one shape, each in a fresh process.

    Raises:
        RuntimeError: if a variant has another loss than the reference.
    """
    context = multiprocessing.get_context("spawn")
    rows = []
    for variant in VARIANTS:
        with context.Pool(1) as pool:  # a separate process, for its own peak
            rows.append(pool.apply(measure_variant, (name, variant, repeats)))
        row, reference = rows[-1], rows[0]
        if abs(row["loss"] - reference["loss"]) > 1e-3 * abs(reference["loss"]):
            raise RuntimeError(f"{variant} has loss {row['loss']}, the reference {reference['loss']}")
        row["speed-up"] = reference["seconds"] / row["seconds"]
        row["memory ratio"] = row["peak MB"] / reference["peak MB"]
        print(f"{row['model']}, {variant}: {row['seconds']:.2f} s, {row['peak MB']:.0f} MB", file=sys.stderr)
    return rows


def measure_variant(name: str, variant: str, repeats: int) -> dict[str, Any]:
    """Seconds and memory of one optimizer step."""
    torch.set_num_threads(1)
    shape = SHAPES[name]
    before = resident_megabytes()
    model = build_model(shape)
    examples = make_examples(shape)
    batch = collate(model, examples, variant)
    flops, work = model_flops(model), Work(*count_work(batch, NUM_IMAGE_TOKENS).tolist())
    head = flops.text_target.forward
    compute = straightforward_step if variant == "reference" else our_step
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, foreach=False)
    times, losses = [], []
    for _ in range(repeats + 1):  # the first one allocates the optimizer's state
        start = time.process_time()
        losses.append(train_step(model, batch, optimizer, compute))
        times.append(time.process_time() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    seconds = min(times[1:])
    return {
        "model": shape.title,
        "variant": variant,
        "seconds": seconds,
        "peak MB": peak - before,
        "loss": losses[-1],
        "tokens/s": work.tokens / seconds,
        "GFLOP/s of the model": flops.total(work) / seconds / 1e9,
        "lm_head, share of decoder": head / (head + flops.token.forward),
    }


def train_step(
    model: MetaMorphForConditionalGeneration,
    batch: dict[str, Any],
    optimizer: torch.optim.Optimizer,
    compute: Callable[[MetaMorphForConditionalGeneration, dict[str, Any]], Tensor],
) -> float:
    """Forward, backward, update; returns the loss."""
    loss = compute(model, batch)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def our_step(model: MetaMorphForConditionalGeneration, batch: dict[str, Any]) -> Tensor:
    """The loss as the package computes it."""
    loss = model(**batch).loss
    assert loss is not None
    return loss


def straightforward_step(model: MetaMorphForConditionalGeneration, batch: dict[str, Any]) -> Tensor:
    """The loss as one would first write it: everything for every position, and the mask afterwards.

    The tower is part of the forward; logits and predicted visual tokens of all positions are computed, in float32,
    and shifted; the labels choose among them.
    """
    config, parts = model.config, model.model
    patches = parts.vision_tower.encoder(batch["pixel_values"]).last_hidden_state
    visual_tokens = normalize_visual_tokens(
        parts.vision_tower.reduction(patches), normalize=config.normalize_vision, apply_softmax=config.apply_softmax
    )
    is_image = batch["input_ids"] == config.image_token_id
    embeds = parts.language_model.get_input_embeddings()(batch["input_ids"])
    embeds = embeds.masked_scatter(is_image.unsqueeze(-1), parts.mm_projector(visual_tokens))
    hidden = parts.language_model(inputs_embeds=embeds, attention_mask=batch["attention_mask"], use_cache=False)[0]
    logits = model.lm_head(hidden).float()
    shifted, labels = logits[:, :-1].contiguous(), batch["labels"][:, 1:].contiguous()
    text = F.cross_entropy(shifted.view(-1, shifted.shape[-1]), labels.view(-1), ignore_index=-100)
    targets = torch.zeros(*is_image.shape, visual_tokens.shape[-1])
    targets = targets.masked_scatter(is_image.unsqueeze(-1), visual_tokens.detach())[:, 1:]
    predictions = F.normalize(model.vision_head(hidden).float(), dim=-1)[:, :-1]
    distance = 1 - (predictions * targets).sum(dim=-1)
    mask = batch["visual_target_mask"][:, 1:]
    return text + config.vision_coef * (distance * mask).sum() / mask.sum()


def build_model(shape: Shape) -> MetaMorphForConditionalGeneration:
    """Random weights, as stage 2 trains them: the tower is frozen."""
    torch.manual_seed(0)
    config = MetaMorphConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": shape.vocabulary,
            "hidden_size": 512,
            "intermediate_size": 1792,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 192,
            "intermediate_size": 768,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": 384,
            "patch_size": 14,
        },
        num_image_tokens=NUM_IMAGE_TOKENS,
        image_token_id=IMAGE,
        image_start_token_id=START,
        image_end_token_id=END,
    )
    model = MetaMorphForConditionalGeneration(config).train()
    model.model.vision_tower.requires_grad_(False)
    return model


def make_examples(shape: Shape) -> list[dict[str, Any]]:
    """The samples of the batch, of random tokens and pixels."""
    generator = torch.Generator().manual_seed(0)
    image = [START, *[IMAGE] * NUM_IMAGE_TOKENS, END]
    examples = []
    for question, answer, shown, drawn in SAMPLES:
        words = torch.randint(4, shape.vocabulary, (question + answer,), generator=generator).tolist()
        prompt, reply = [*image * shown, *words[:question]], [*words[question:], *image * drawn]
        ids = torch.tensor(prompt + reply)
        is_reply = torch.arange(len(ids)) >= len(prompt)
        examples.append(
            {
                "input_ids": ids,
                "labels": ids.masked_fill(~is_reply | (ids == IMAGE), -100),
                "visual_target_mask": is_reply & (ids == IMAGE),
                "pixel_values": torch.randn(shown + drawn, 3, 384, 384, generator=generator),
            }
        )
    return examples


def collate(model: MetaMorphForConditionalGeneration, examples: list[dict[str, Any]], variant: str) -> dict[str, Any]:
    """The batch of a variant."""
    if variant == "packed":
        total = sum(len(example["input_ids"]) for example in examples)
        batch = PackedCollator(0, image_token_id=IMAGE)([examples])
        assert batch["input_ids"].numel() == total
        return batch
    if variant == "reference":
        return PaddedCollator(0)(examples)
    batch = PaddedCollator(0, IMAGE)(examples)
    if variant == "padded, feature cache":
        with torch.no_grad():
            batch["visual_tokens"] = model.get_visual_tokens(batch.pop("pixel_values"))
    return batch


if __name__ == "__main__":
    main()
