"""Small models of real architectures and batches for them, shared by all tests."""

from pathlib import Path

import torch

from metamorph.models.configuration_metamorph import MetaMorphConfig
from metamorph.models.modeling_metamorph import MetaMorphForConditionalGeneration


GOLDEN = Path(__file__).parents[1] / "golden"


def tiny_config(**overrides) -> MetaMorphConfig:
    """A Llama with 2 layers and 64 tokens, a SigLIP with 2 layers and 16 patches reduced to 4 visual tokens."""
    fields = {
        "text_config": {
            "model_type": "llama",
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 24,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 8,
        },
        "num_image_tokens": 4,
        "image_token_id": 61,
        "image_start_token_id": 62,
        "image_end_token_id": 63,
    }
    for name, value in overrides.items():
        fields[name] = {**fields[name], **value} if isinstance(value, dict) and name in fields else value
    return MetaMorphConfig(**fields)


def build_tiny_model(seed: int = 0, **overrides) -> MetaMorphForConditionalGeneration:
    """A model with random weights, large enough that its outputs differ from token to token."""
    torch.manual_seed(seed)
    model = MetaMorphForConditionalGeneration(tiny_config(initializer_range=0.2, **overrides))
    return model.eval()


def image_ids(config: MetaMorphConfig) -> list[int]:
    """The ids of one image: start, placeholders, end."""
    markers = (config.image_start_token_id, config.image_end_token_id)
    return [markers[0], *[config.image_token_id] * config.num_image_tokens, markers[1]]


def build_batch(config: MetaMorphConfig, kinds: str = "vgmt", seed: int = 0) -> dict[str, torch.Tensor | None]:
    """A padded batch with one row for each letter: (v)qa, (g)eneration, (m)ulti-image edit, (t)ext only."""
    generator = torch.Generator().manual_seed(seed)
    image = image_ids(config)

    def words(count: int) -> list[int]:
        return torch.randint(3, 60, (count,), generator=generator).tolist()

    rows = []
    for kind in kinds:
        source, answer = {"v": (1, 0), "g": (0, 1), "m": (1, 1), "t": (0, 0)}[kind]
        prompt = [1, *words(3), *image * source, *words(2)]
        reply = [*words(2), *image * answer, *words(3), 2]
        rows.append((prompt, reply, source + answer))
    length = max(len(prompt) + len(reply) for prompt, reply, _ in rows)
    batch = {
        "input_ids": torch.zeros(len(rows), length, dtype=torch.long),
        "attention_mask": torch.zeros(len(rows), length, dtype=torch.long),
        "labels": torch.full((len(rows), length), -100),
        "visual_target_mask": torch.zeros(len(rows), length, dtype=torch.bool),
    }
    for row, (prompt, reply, _) in enumerate(rows):
        ids = torch.tensor(prompt + reply)
        batch["input_ids"][row, : len(ids)] = ids
        batch["attention_mask"][row, : len(ids)] = 1
        answer_ids = torch.tensor(reply)
        is_placeholder = answer_ids == config.image_token_id
        batch["labels"][row, len(prompt) : len(ids)] = answer_ids.masked_fill(is_placeholder, -100)
        batch["visual_target_mask"][row, len(prompt) : len(ids)] = is_placeholder
    images = sum(count for *_, count in rows)
    size = config.vision_image_size
    batch["pixel_values"] = torch.randn(images, 3, size, size, generator=generator) if images else None
    return batch
