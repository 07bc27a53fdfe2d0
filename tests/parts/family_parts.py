"""Tiny random models of several families, each saved as the folder that `metamorph train` reads."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Siglip2ImageProcessorPil,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)


IMAGE_SIZE, PATCH_SIZE = 32, 8
SENTENCES = (
    "a red square",
    "a blue square",
    "what is shown ?",
    "draw a red square",
    "here it is :",
    "You are helpful .",
)
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "[INST] {{ message['content'] }}[/INST]{% else %} {{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)


def byte_tokenizer(
    special: Sequence[str], chat_template: str, add_bos: bool = False, **names: str
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a few merges; with `add_bos`, texts begin with `bos_token`, as Mistral's do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    if add_bos:
        bos = names["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=chat_template, **names)


def chatml_tokenizer() -> PreTrainedTokenizerFast:
    """Control tokens as in Qwen's and SmolLM's tokenizers; no BOS, and padding differs from the end of a turn."""
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    return byte_tokenizer(special, CHATML, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def mistral_tokenizer() -> PreTrainedTokenizerFast:
    """Control tokens as in Mistral's tokenizer; there is no padding token."""
    special = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]")
    return byte_tokenizer(special, MISTRAL, add_bos=True, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def save_language_model(folder: Path, family: str) -> str:
    """Save a random language model with its tokenizer; returns the folder as a string.

    `family` is `qwen2`, `qwen3`, `mistral`, `smollm` (a Llama with tied embeddings), or a mixture of experts: `mixtral`
    or `qwen3_moe`.
    """
    torch.manual_seed(0)
    tokenizer = mistral_tokenizer() if family == "mistral" else chatml_tokenizer()
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vocabulary = len(tokenizer)
    model: PreTrainedModel
    if family == "qwen2":  # Qwen's table has more rows than its tokenizer has tokens
        model = Qwen2ForCausalLM(Qwen2Config(**sizes, vocab_size=vocabulary + 29))
    elif family == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**sizes, vocab_size=vocabulary, head_dim=16))
    elif family == "mistral":
        model = MistralForCausalLM(MistralConfig(**sizes, vocab_size=vocabulary, sliding_window=None))
    elif family == "mixtral":
        model = MixtralForCausalLM(MixtralConfig(**sizes, vocab_size=vocabulary, num_local_experts=4))
    elif family == "qwen3_moe":
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 16}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **experts, vocab_size=vocabulary))
    else:
        model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=vocabulary, tie_word_embeddings=True))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_vision_model(folder: Path, family: str) -> str:
    """Save a random `clip`, `dinov2`, `siglip` or `siglip2` with 4×4 patches of 8 pixels, and its image processor."""
    torch.manual_seed(1)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": PATCH_SIZE}
    pixels = {"image_size": IMAGE_SIZE}
    square = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    build: dict[str, Callable[[], tuple]] = {
        "clip": lambda: (
            CLIPVisionModel(CLIPVisionConfig(**sizes, **pixels, intermediate_size=48)),
            CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=square),
        ),
        "dinov2": lambda: (
            Dinov2Model(Dinov2Config(**sizes, **pixels, mlp_ratio=2)),
            BitImageProcessorPil(size={"shortest_edge": 40}, crop_size=square),
        ),
        "siglip": lambda: (
            SiglipVisionModel(SiglipVisionConfig(**sizes, **pixels, intermediate_size=48)),
            SiglipImageProcessorPil(size=square),
        ),
        "siglip2": lambda: (
            Siglip2VisionModel(Siglip2VisionConfig(**sizes, num_patches=16, intermediate_size=48)),
            Siglip2ImageProcessorPil(patch_size=PATCH_SIZE, max_num_patches=16),
        ),
    }
    model, image_processor = build[family]()
    model.save_pretrained(folder)
    image_processor.save_pretrained(folder)
    return str(folder)


def write_records(folder: Path) -> tuple[str, str]:
    """Write eight records: questions about images, images to draw, edits, text; returns JSONL file and image folder."""
    images = folder / "images"
    images.mkdir(parents=True)
    for name, colour in (("red", (200, 30, 30)), ("blue", (30, 30, 200))):
        image = Image.new("RGB", (48, 40), "white")
        image.paste(colour, (8, 8, 32, 32))
        image.save(images / f"{name}.png")
    turns = {
        "ask": ("<image>\nwhat is shown ?", "a {} square", "{}.png"),
        "draw": ("draw a {} square", "here it is : <image>", "{}.png"),
        "edit": ("<image> draw a {} square", "<image>", ["{other}.png", "{}.png"]),
        "text": ("what is shown ?", "a {} square", None),
    }
    records = []
    for kind, (question, answer, image) in turns.items():
        for colour, other in (("red", "blue"), ("blue", "red")):
            fill = lambda text, colour=colour, other=other: text.format(colour, other=other)  # noqa: E731
            record: dict = {
                "id": f"{kind}-{colour}",
                "conversations": [
                    {"from": "human", "value": fill(question)},
                    {"from": "gpt", "value": fill(answer)},
                ],
            }
            if image is not None:
                record["image"] = fill(image) if isinstance(image, str) else [fill(name) for name in image]
            records.append(record)
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path), str(images)
