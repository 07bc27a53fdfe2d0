"""Loads the reference numbers and the small original-layout checkpoint they were computed with."""

import json
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file

from metamorph.models.configuration_metamorph import MetaMorphConfig
from metamorph.models.modeling_metamorph import MetaMorphForConditionalGeneration


GOLDEN = Path(__file__).parents[1] / "golden"
PLACEHOLDER = 384  # one above the original's vocabulary, which has no placeholder row
ORIGINAL_IMAGE = -200
TOLERANCE = 1e-5


@cache
def tensors(name: str) -> dict[str, torch.Tensor]:
    """The tensors of one golden file, `micro/batch` for example. Callers must not change them."""
    return load_file(GOLDEN / f"{name}.safetensors")


@cache
def numbers(name: str) -> dict:
    """One golden JSON file."""
    return json.loads((GOLDEN / f"{name}.json").read_text())


def our_name(name: str) -> str | None:
    """The name of an original parameter in our model; None for those that ours does not have."""
    if name.startswith("model.vision_proj") or ".post_layernorm." in name:
        return None  # never used by the original's forward
    if name.startswith("model.vision_tower.vision_tower."):
        return name.replace("model.vision_tower.vision_tower.", "model.vision_tower.encoder.")
    if name.startswith(("model.mm_projector.", "vision_head.", "lm_head.")):
        return name
    return name.replace("model.", "model.language_model.", 1)


def golden_model(**overrides) -> MetaMorphForConditionalGeneration:
    """The small model of the reference run, its embedding table grown by a placeholder row that is never looked up."""
    sizes = numbers("micro/config")
    text = {
        "model_type": "llama",
        **sizes["llama"],
        "vocab_size": sizes["vocab_size"],
        "rms_norm_eps": sizes["rms_norm_eps"],
        "rope_parameters": {"rope_type": "default", "rope_theta": sizes["rope_theta"]},
        "bos_token_id": sizes["ids"]["bos"],
        "eos_token_id": sizes["ids"]["eot"],
    }
    vision = {"model_type": "siglip_vision_model", **sizes["vision"], "layer_norm_eps": sizes["siglip_layer_norm_eps"]}
    fields = {
        "num_image_tokens": sizes["num_image_tokens"],
        "image_token_id": PLACEHOLDER,
        "image_start_token_id": sizes["ids"]["image_start"],
        "image_end_token_id": sizes["ids"]["image_end"],
        **overrides,
    }
    model = MetaMorphForConditionalGeneration(MetaMorphConfig(text_config=text, vision_config=vision, **fields))
    weights = {our_name(name): value for name, value in tensors("micro/weights").items()}
    weights.pop(None)
    model.load_state_dict(weights, strict=True)
    table = model.get_input_embeddings()
    table.weight = torch.nn.Parameter(torch.cat([table.weight.detach(), torch.zeros(1, table.weight.shape[1])]))
    model.config.text_config.pad_token_id = sizes["ids"]["end_of_text"]
    return model


def expand_placeholders(batch: dict[str, torch.Tensor], max_length: int | None = None) -> dict[str, torch.Tensor]:
    """The original's ids (one -200 for each image) in our form (N placeholders), cut and padded on the right."""
    count, pad = numbers("micro/config")["num_image_tokens"], numbers("micro/config")["ids"]["end_of_text"]
    rows: list[list[tuple[int, int, bool, bool]]] = []
    columns = zip(batch["input_ids"].tolist(), batch["labels"].tolist(), batch["attention_mask"].tolist(), strict=True)
    for ids, labels, mask in columns:
        row = []
        for token, label, is_real in zip(ids, labels, mask, strict=True):
            if token == ORIGINAL_IMAGE:
                row += [(PLACEHOLDER, -100, True, label == ORIGINAL_IMAGE)] * count
            elif is_real:
                row.append((token, label, True, False))
        rows.append(row[:max_length])
    length = max(len(row) for row in rows)
    padded = [row + [(pad, -100, False, False)] * (length - len(row)) for row in rows]
    ids, labels, mask, targets = torch.tensor(padded, dtype=torch.long).unbind(-1)
    return {"input_ids": ids, "labels": labels, "attention_mask": mask, "visual_target_mask": targets.bool()}


def golden_batch() -> dict[str, torch.Tensor]:
    """The reference batch: question, generation, image to image, text only."""
    batch = tensors("micro/batch")
    # The fifth image is the original's zero image for the text-only sample: ours needs none.
    return {**expand_placeholders(batch), "pixel_values": batch["images"][:4]}


def assert_close(ours: torch.Tensor, reference: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    """Compares shapes and the largest absolute difference."""
    assert ours.shape == reference.shape
    difference = (ours.float() - reference.float()).abs().max().item()
    assert difference <= tolerance, f"largest difference {difference:.2e}"
