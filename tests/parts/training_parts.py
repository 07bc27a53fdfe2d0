"""Tiny pretrained parts on disk, and LLaVA data with images, for tests that train through the real commands."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from metamorph.training.arguments import DataArguments, MetaMorphTrainingArguments, ModelArguments


TOKENIZER = Path(__file__).parent.parent / "golden" / "tokenizer"
IMAGE_SIZE = 32
NUM_IMAGE_TOKENS = 4


def make_language_model(folder: Path, **overrides: object) -> Path:
    """A Llama with random weights and the golden tokenizer (384 tokens, Llama-3's special ones among them)."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 384,
        "tie_word_embeddings": False,
        **overrides,
    }
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
    return folder


def make_vision_tower(folder: Path) -> Path:
    """A SigLIP vision model with random weights, 4×4 patches, and its image processor."""
    torch.manual_seed(1)
    config = SiglipVisionConfig(
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=8,
    )
    SiglipVisionModel(config).save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}).save_pretrained(folder)
    return folder


def make_records(folder: Path, count: int = 12) -> Path:
    """Image questions, answers with an image, image edits and plain text in turn; images in `folder`/images."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for index in range(count):
        pixels = rng.integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{index}.png")
    kinds = [
        (["<image>\nWhat is this?", "A picture."], 1),
        (["Draw something.", "Here: <image>"], 1),
        (["<image>\nMake it brighter, please.", "<image>"], 2),
        (["What colour is the sky on a clear day?", "Blue."], 0),
    ]
    records = []
    for index in range(count):
        (question, answer), images = kinds[index % len(kinds)]
        records.append(
            {
                "id": f"sample-{index}",
                "image": [f"{(index + k) % count}.png" for k in range(images)],
                "conversations": [
                    {"from": "human", "value": f"{question} ({index})"},
                    {"from": "gpt", "value": f"{answer} Number {index}." if index % 2 else answer},
                ],
            }
        )
    return write_records(folder / "data.jsonl", records)


def write_records(path: Path, records: list[dict]) -> Path:
    """Write LLaVA records as JSONL."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def arguments(
    parts: Path, output_dir: Path, *, stage: int, **flags: object
) -> tuple[ModelArguments, DataArguments, MetaMorphTrainingArguments]:
    """The three argument objects of a float32 run of four steps, one sample a row, on the parts in `parts`.

    Args:
        parts: Folder with `llm`, `tower`, `data.jsonl` and `images`.
        output_dir: Where the run writes.
        stage: 1 or 2.
        flags: Any flags of `metamorph train`.
    """
    values: dict[str, object] = {
        "model_name_or_path": str(parts / "llm"),
        "vision_tower": str(parts / "tower"),
        "num_image_tokens": NUM_IMAGE_TOKENS,
        "tune_mm_mlp_adapter": stage == 1,
        "data_path": str(parts / "data.jsonl"),
        "image_folder": str(parts / "images"),
        "output_dir": str(output_dir),
        "bf16": False,
        "learning_rate": 1e-2,
        "max_steps": 4,
        "packing": False,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "save_total_limit": 0,
        "disable_tqdm": True,
        "use_cpu": True,
        **flags,
    }
    types = (ModelArguments, DataArguments, MetaMorphTrainingArguments)
    built = []
    for kind in types:
        names = [name for name in values if name in kind.__dataclass_fields__]
        built.append(kind(**{name: values.pop(name) for name in names}))
    assert not values, f"unknown flags {list(values)}"
    return tuple(built)


def run_engines(parts: Path, folder: Path, runs: dict[str, dict[str, Any]], processes: int = 2) -> None:
    """Train with the flags of each run on several processes, one run after another: see `engine_worker.py`."""
    (folder / "runs.json").write_text(json.dumps(runs))
    worker = Path(__file__).parent.parent / "training" / "engine_worker.py"
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))
    subprocess.run(
        [sys.executable, *launcher, str(worker), str(parts), str(folder)],
        check=True,
        timeout=900,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
    )


def training_lines(result: Any) -> list[dict[str, float]]:
    """The entries that a run has logged while training."""
    return [line for line in result.log_history if "text_loss" in line]


def logged(result: Any, name: str = "loss") -> list[float]:
    """A value of these entries."""
    return [line[name] for line in training_lines(result)]
