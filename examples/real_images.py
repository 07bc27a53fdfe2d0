"""Both training stages on real photographs, with a SigLIP-shaped 384-pixel tower, on a CPU in about a minute.

The photographs come with scikit-image and scikit-learn; nothing is downloaded. All weights are random and small, so
nothing useful is learned: the example shows the data and arguments of a real run, at the real image size (27×27
patches, reduced to 64 visual tokens), and that both losses fall.

    python examples/real_images.py --output-dir runs/real_images --steps 20
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import skimage.data
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from metamorph.training.arguments import DataArguments, MetaMorphTrainingArguments, ModelArguments
from metamorph.training.run import run_training


CAPTIONS = {
    "astronaut": "an astronaut in an orange suit",
    "camera": "a man behind a camera on a tripod",
    "chelsea": "a tabby cat",
    "clock": "the face of a clock in motion",
    "coffee": "a cup of coffee on a wooden table",
    "coins": "ancient coins in rows",
    "brick": "a brick wall",
    "grass": "a lawn of grass",
    "gravel": "grey gravel",
    "hubble_deep_field": "galaxies in the deep sky",
    "immunohistochemistry": "stained tissue under a microscope",
    "moon": "craters of the moon",
    "retina": "the retina of an eye",
    "rocket": "a rocket on its launch pad",
    "china": "a pagoda in front of mountains",
    "flower": "an orange flower",
}
"""Captions of the photographs, by the name of the function or file that holds each."""

CROPS = {"": (0.0, 1.0), "left half of ": (0.0, 0.5), "right half of ": (0.5, 1.0)}
"""Three images from each photograph: part of its width, by the words that the caption begins with."""

LONGEST_SIDE = 512
LLAMA3_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|finetune_right_pad_id|>",
)


def photographs() -> Iterator[tuple[str, Image.Image]]:
    """Yield name and RGB image of every entry of `CAPTIONS`."""
    for name in CAPTIONS:
        pixels = load_sample_image(f"{name}.jpg") if name in ("china", "flower") else getattr(skimage.data, name)()
        yield name, Image.fromarray(np.asarray(pixels)).convert("RGB")


def write_dataset(folder: Path) -> tuple[Path, Path]:
    """Write 48 JPEG images and 96 LLaVA records, one to describe and one to draw each image.

    Returns:
        Path of the JSONL file, and of the folder with the images.
    """
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    records = []
    for name, photograph in photographs():
        for words, (left, right) in CROPS.items():
            part = photograph.crop((int(left * photograph.width), 0, int(right * photograph.width), photograph.height))
            part.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
            file = f"{name}{words.replace(' ', '_')}.jpg"
            part.save(images / file)
            caption = words + CAPTIONS[name]
            records.append(_record(f"describe {file}", file, "<image>\nWhat does the picture show?", caption))
            records.append(_record(f"draw {file}", file, f"Draw {caption}.", "Here it is: <image>"))
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path, images


def _record(name: str, image: str, question: str, answer: str) -> dict[str, object]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": name, "image": image, "conversations": turns}


def save_base_models(folder: Path) -> tuple[Path, Path]:
    """Save a small random Llama with tokenizer, and a random SigLIP tower with the input of SO400M/14-384.

    Returns:
        Folder of the language model, folder of the tower.
    """
    torch.manual_seed(0)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CAPTIONS.values(), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in LLAMA3_TOKENS])
    language, tower = folder / "llama", folder / "siglip"
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>",
    )
    fast.save_pretrained(language)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(fast),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            initializer_range=128**-0.5,  # random layers of this width pass a signal on; 0.02 would not
            bos_token_id=fast.bos_token_id,
            eos_token_id=fast.eos_token_id,
            pad_token_id=fast.pad_token_id,
        )
    ).save_pretrained(language)
    SiglipVisionModel(
        SiglipVisionConfig(
            image_size=384,
            patch_size=14,
            hidden_size=96,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
    ).save_pretrained(tower)
    SiglipImageProcessorPil(size={"height": 384, "width": 384}).save_pretrained(tower)
    return language, tower


def train(output_dir: Path, steps: int = 20) -> dict[str, list[dict[str, float]]]:
    """Write data and models to `output_dir`, run both stages, and return the log entries of each stage."""
    records, images = write_dataset(output_dir / "data")
    language, tower = save_base_models(output_dir / "models")

    def run(name: str, **stage: object) -> list[dict[str, float]]:
        result = run_training(
            ModelArguments(model_name_or_path=str(language), vision_tower=str(tower), num_image_tokens=64, **stage),
            DataArguments(data_path=str(records), image_folder=str(images), model_max_length=512),
            MetaMorphTrainingArguments(
                output_dir=str(output_dir / name),
                max_steps=steps,
                packing=False,
                per_device_train_batch_size=8,
                learning_rate=3e-3,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                bf16=False,
            ),
        )
        return [line for line in result.log_history if "text_loss" in line]

    stage1 = run("stage1", tune_mm_mlp_adapter=True, use_vision_ar=False)
    stage2 = run("stage2", pretrain_mm_mlp_adapter=str(output_dir / "stage1"), use_vision_ar=True)
    return {"stage1": stage1, "stage2": stage2}


def main() -> None:
    """Train, and print both losses of the first and last steps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, default=Path("runs/real_images"))
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of each stage (default: %(default)s)")
    flags = parser.parse_args()
    for stage, lines in train(flags.output_dir, flags.steps).items():
        for name in ("text_loss", "visual_loss"):
            values = [line[name] for line in lines if name in line]
            if values:
                print(f"{stage} {name}: {values[0]:.3f} at the first step, {values[-1]:.3f} at the last")


if __name__ == "__main__":
    main()
