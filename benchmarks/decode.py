"""What a token of an answer with images costs, compared with plain text generation and with recomputing the sequence.

    OMP_NUM_THREADS=1 python benchmarks/decode.py --output benchmarks/results/decode.json

On a CPU (one thread, float32), with a Llama of 15 M parameters: answers of 20 tokens of text and 1, 2 or 4 images of 64
tokens, by `generate`, by `reply_to`, by `generate` without a cache, and as many tokens by `LlamaForCausalLM.generate`
with the same decoder. All arms take turns, so that other programs disturb them alike: ratios are medians over the
rounds. Seconds are processor time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessor

from data import machine
from metamorph.inference import Prompt, reply_to
from metamorph.mini import asset_path
from metamorph.models.image_processing import load_image_processor
from metamorph.models.modeling_metamorph import MetaMorphForConditionalGeneration
from metamorph.models.pretrained import load_tokenizer
from metamorph.models.processing_metamorph import MetaMorphProcessor
from metamorph.models.vision_tower import load_vision_encoder


NUM_IMAGE_TOKENS = 64
TEXT_TOKENS = 20
IMAGES = (1, 2, 4)
BATCH = 8
PROMPT = "draw the object that is left of the large circle, and say what color it has"


class Script(LogitsProcessor):
    """Makes every row write given ids: the weights are random."""

    def __init__(self, ids: Sequence[int], prompt_length: int) -> None:
        self.ids, self.prompt_length = ids, prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Prefer the next id of the script."""
        scores[:, self.ids[input_ids.shape[1] - self.prompt_length]] = 1e4
        return scores


class Decoding:
    """The models, and what each arm does with them."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        tokenizer = load_tokenizer(asset_path("mini-llama"))
        self.llama = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=384,
                intermediate_size=1024,
                num_hidden_layers=8,
                num_attention_heads=6,
                tie_word_embeddings=True,
            )
        ).eval()
        # The composite holds the decoder itself, not a copy.
        self.model = MetaMorphForConditionalGeneration.from_parts(
            self.llama,
            load_vision_encoder(str(asset_path("mini-siglip"))),
            tokenizer,
            num_image_tokens=NUM_IMAGE_TOKENS,
        ).eval()
        images = load_image_processor(str(asset_path("mini-siglip")))
        self.processor = MetaMorphProcessor.from_parts(tokenizer, images, self.model.config)
        self.word: int = tokenizer.encode("circle", add_special_tokens=False)[0]
        self.ends = {"eos_token_id": self.processor.end_of_turn_token_ids, "pad_token_id": self.processor.pad_token_id}

    def script(self, num_images: int) -> list[int]:
        """Ids of an answer: half of its text, the images, the other half."""
        config, text = self.model.config, [self.word] * (TEXT_TOKENS // 2)
        image = [config.image_start_token_id, *[config.image_token_id] * NUM_IMAGE_TOKENS, config.image_end_token_id]
        return [*text, *image * num_images, *text]

    def generate(self, model: Any, num_images: int, batch: int = 1, **options: Any) -> Tensor:
        """Write the script with `generate` of a model."""
        messages = [[{"role": "user", "content": PROMPT}]] * batch
        inputs = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
        ids = self.script(num_images)
        script = Script(ids, inputs["input_ids"].shape[1])
        output = model.generate(
            **inputs,
            max_new_tokens=len(ids),
            do_sample=False,
            logits_processor=[script],
            return_dict_in_generate=True,
            **self.ends,
            **options,
        )
        written = output.sequences[:, script.prompt_length :].tolist()
        assert written == [ids] * batch, "the answer is not the script"
        return output.sequences

    def reply(self, num_images: int, batch: int = 1) -> None:
        """Write the script with `reply_to`."""
        inputs: Any = self.processor.apply_chat_template(
            [{"role": "user", "content": PROMPT}], add_generation_prompt=True, tokenize=True
        )
        ids = self.script(num_images)
        script = Script(ids, inputs["input_ids"].shape[1])
        replies = reply_to(
            self.model,
            self.processor,
            [Prompt(PROMPT)] * batch,
            max_new_tokens=len(ids),
            logits_processor=[script],
        )
        assert all(reply.num_images == num_images and reply.num_tokens == len(ids) for reply in replies)


def main() -> None:
    """Measure all arms, print a table and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks/results/decode.json"), help="JSON file to write"
    )
    parser.add_argument("--rounds", type=int, default=7, help="turns of every arm (default: %(default)s)")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    decoding = Decoding()
    parameters = sum(weight.numel() for weight in decoding.llama.parameters())
    rows = [row for count in IMAGES for row in compare(decoding, count, flags.rounds)]
    report = {"machine": machine(), "llama_parameters": parameters, "rows": rows}
    flags.output.parent.mkdir(parents=True, exist_ok=True)
    flags.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report["machine"], indent=2))
    print("\n| What | Images | Value | Smallest and largest | Unit | Aim |\n|---|---:|---:|---:|---|---|")
    for row in rows:
        spread = f"{min(row['rounds']):.4g} – {max(row['rounds']):.4g}"
        print(f"| {row['what']} | {row['images']} | {row['value']:.4g} | {spread} | {row['unit']} | {row['aim']} |")


def compare(decoding: Decoding, num_images: int, rounds: int) -> list[dict[str, Any]]:
    """The rows of one kind of answer."""
    arms: dict[str, Callable[[], object]] = {
        "plain": partial(decoding.generate, decoding.llama, num_images),
        "generate": partial(decoding.generate, decoding.model, num_images),
        "reply_to": partial(decoding.reply, num_images),
        "recomputed": partial(decoding.generate, decoding.model, num_images, use_cache=False),
        "batch": partial(decoding.generate, decoding.model, num_images, BATCH),
        "reply_to, batch": partial(decoding.reply, num_images, BATCH),
    }
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds + 1):
        for name, run in arms.items():
            start = time.process_time()
            run()
            if number:  # the first round warms up
                seconds[name].append(time.process_time() - start)
        print(f"{num_images} images, round {number} of {rounds}", file=sys.stderr)
    tokens = len(decoding.script(num_images))

    def row(what: str, unit: str, aim: str, values: list[float]) -> dict[str, Any]:
        value = statistics.median(values)
        return {"what": what, "images": num_images, "value": value, "unit": unit, "aim": aim, "rounds": values}

    def ratio(above: str, below: str, factor: float = 1.0) -> list[float]:
        return [factor * left / right for left, right in zip(seconds[above], seconds[below], strict=True)]

    faster = {1: "≥ 2.5", 4: "≥ 4.5"}.get(num_images, "")
    return [
        row("a token of plain generation", "ms CPU", "", [1e3 * value / tokens for value in seconds["plain"]]),
        row("a token of `generate` / of plain", "×", "≤ 1.10", ratio("generate", "plain")),
        row("a token of `reply_to` / of plain", "×", "", ratio("reply_to", "plain")),
        row("recomputing the sequence / `generate`", "×", faster, ratio("recomputed", "generate")),
        row(f"tokens/s of `generate` with {BATCH} rows / one row", "×", "≥ 4", ratio("generate", "batch", BATCH)),
        row(
            f"tokens/s of `reply_to` with {BATCH} rows / one row", "×", "", ratio("reply_to", "reply_to, batch", BATCH)
        ),
    ]


if __name__ == "__main__":
    main()
