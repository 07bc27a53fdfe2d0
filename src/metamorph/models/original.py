"""Checkpoints in the layout of the original MetaMorph: one Llama that contains the other parts, loaded as a model of
ours.

Names: `model.embed_tokens`, `model.layers.*`, `model.norm` and `lm_head` of Llama; `model.vision_tower.vision_tower.*`
of the tower (absent where it was not saved), `model.mm_projector.*`, `vision_head.*`, and `model.vision_proj.*`, which
is unused. The configuration is Llama's with fields of LLaVA.
"""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from metamorph.files.model_files import check_finite, check_weights, read_json_object, shard_names
from metamorph.models.sequence.constants import ASPECT_RATIOS
from metamorph.models.sequence.image_tokens import image_token_names

from .configuration_metamorph import MetaMorphConfig
from .connector import MATCHING_FIELDS, WEIGHT_FILES
from .image_processing import load_image_processor
from .modeling_metamorph import MetaMorphForConditionalGeneration
from .pretrained import check_layers, load_tokenizer, read_tensors
from .processing_metamorph import MetaMorphProcessor
from .vision_tower import load_vision_config, load_vision_encoder, resolve_vision_tower


logger = logging.getLogger(__name__)

MODEL_TYPES = ("metamorph_llama", "llava_llama", "llama")
TEMPLATE = "llama3_original"  # conversation template that such models were trained with
SHARED_FIELDS = (*MATCHING_FIELDS, "mm_use_im_patch_token", "use_vision_ar", "vision_coef")
"""Fields of the original's configuration with the same names in ours."""
PREFIXES = {
    "vision_tower": "model.vision_tower.vision_tower.",
    "mm_projector": "model.mm_projector.",
    "vision_head": "vision_head.",
    "unused": "model.vision_proj.",
    "language_model": "",
}
"""Part -> prefix of its weights; the first that matches."""


def load_original(
    folder: str | Path,
    *,
    tokenizer: str | None = None,
    vision_tower: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[MetaMorphForConditionalGeneration, MetaMorphProcessor]:
    """Load a checkpoint of the original system as a model and a processor of ours.

    `folder` has `config.json` and the weights, as safetensors or as `.bin` files of tensors only, and the tokenizer
    unless `tokenizer` names another folder or Hub id. `vision_tower`, by default what the configuration names, gives
    the tower's configuration and image processor, and its weights if the checkpoint has none.
    """
    folder = Path(folder)
    fields = _read_config(folder)
    weights = _split_weights(_read_weights(folder), folder)
    tower_name = vision_tower or fields.get("mm_vision_tower")
    if tower_name is None:
        raise ValueError(f"{folder / 'config.json'} names no mm_vision_tower: give it as --vision-tower")
    text_tokenizer = load_tokenizer(tokenizer or folder)
    overrides = _overrides(fields, weights["vision_head"], folder)
    # Added here, they are tokens that the language model knows: `from_parts` keeps the rows of those.
    names = image_token_names(
        mm_use_im_start_end=overrides.get("mm_use_im_start_end", MetaMorphConfig.mm_use_im_start_end),
        mm_use_im_patch_token=overrides.get("mm_use_im_patch_token", MetaMorphConfig.mm_use_im_patch_token),
    )
    text_tokenizer.add_tokens(names, special_tokens=True)
    model = MetaMorphForConditionalGeneration.from_parts(
        _language_model(fields, weights["language_model"], dtype, folder),
        _vision_encoder(tower_name, weights["vision_tower"], dtype, folder),
        text_tokenizer,
        **overrides,
    )
    _load(model.model.mm_projector, weights["mm_projector"], f"{folder}: mm_projector")
    _load(model.vision_head, weights["vision_head"], f"{folder}: vision_head")
    aspect_ratio = fields.get("image_aspect_ratio", "square")
    processor = MetaMorphProcessor.from_parts(
        text_tokenizer,
        load_image_processor(resolve_vision_tower(tower_name)),
        model.config,
        image_aspect_ratio=aspect_ratio if aspect_ratio in ASPECT_RATIOS else "square",
    )
    model.generation_config.eos_token_id = processor.end_of_turn_token_ids
    return model.eval(), processor


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no config.json: give the folder of an original checkpoint")
    fields = read_json_object(file)
    if fields.get("model_type") not in MODEL_TYPES:
        raise ValueError(
            f"{file} has model_type {fields.get('model_type')!r}, which is not a checkpoint of the original layout; "
            f"those have one of {', '.join(MODEL_TYPES)}"
        )
    return fields


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, read without running any code in its files."""
    name = next((name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if name is None:
        raise FileNotFoundError(f"{folder} has no weights: one of {', '.join(WEIGHT_FILES)} is needed")
    files = shard_names(folder / name) if name.endswith(".index.json") else [name]
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors.update(read_tensors(folder / file)[0])
    return tensors


def _split_weights(tensors: Mapping[str, Tensor], folder: Path) -> dict[str, dict[str, Tensor]]:
    """The tensors of each part, by their names in the part."""
    weights: dict[str, dict[str, Tensor]] = {part: {} for part in PREFIXES}
    for name, value in tensors.items():
        part, prefix = next((part, prefix) for part, prefix in PREFIXES.items() if name.startswith(prefix))
        rest = name.removeprefix(prefix)
        if part == "vision_tower":
            rest = rest.removeprefix("vision_model.")
            if rest.startswith("head."):  # pooling, which is never used
                continue
        weights[part][rest] = value
    if not weights["mm_projector"] or not weights["vision_head"]:
        raise ValueError(
            f"{folder} holds no {PREFIXES['mm_projector']}* or no {PREFIXES['vision_head']}*: it is not a finished "
            "model of the original layout (for a connector of stage 1, give its mm_projector.bin)"
        )
    return weights


def _overrides(fields: Mapping[str, Any], vision_head: Mapping[str, Tensor], folder: Path) -> dict[str, Any]:
    """Fields of our configuration; those that the original's lacks keep our defaults."""
    overrides: dict[str, Any] = {name: fields[name] for name in SHARED_FIELDS if fields.get(name) is not None}
    absent = sorted(set(SHARED_FIELDS) - set(overrides))
    if absent:
        logger.info("%s does not set %s: using our defaults", folder / "config.json", ", ".join(absent))
    layers = {name.partition(".")[0] for name in vision_head}
    if layers == {"0", "2"}:
        overrides["vision_head_type"] = "mlp"
    elif layers == {"weight", "bias"}:
        overrides["vision_head_type"] = "linear"
    else:
        raise ValueError(
            f"{folder} has a vision head of the layers {', '.join(sorted(layers))}; heads of one (linear) or two (mlp) "
            "linear layers can be converted"
        )
    return {**overrides, "version": TEMPLATE}


def _language_model(
    fields: Mapping[str, Any], weights: dict[str, Tensor], dtype: torch.dtype, folder: Path
) -> PreTrainedModel:
    known = {*LlamaConfig().to_dict(), "rope_theta", "rope_scaling"} - {"model_type", "architectures"}
    config = LlamaConfig(**{name: value for name, value in fields.items() if name in known})
    config.vocab_size = weights["model.embed_tokens.weight"].shape[0]
    if config.tie_word_embeddings:
        weights = {"lm_head.weight": weights["model.embed_tokens.weight"], **weights}
    check_layers(config, len(weights), folder)
    return _build(lambda: LlamaForCausalLM(config), weights, f"{folder}: the language model").to(dtype)


def _vision_encoder(name: str, weights: dict[str, Tensor], dtype: torch.dtype, folder: Path) -> PreTrainedModel:
    if not weights:
        logger.info("%s holds no vision tower: loading it from %s", folder, name)
        return load_vision_encoder(name, dtype)
    config = load_vision_config(name)
    if hasattr(config, "vision_use_head"):
        config.vision_use_head = False
    check_layers(config, len(weights), folder)
    build = partial(AutoModel.from_config, config, trust_remote_code=False)
    with torch.device("meta"):
        # Some versions of Transformers prefix the encoder's names with `vision_model.`.
        ours = {name.removeprefix("vision_model."): name for name in build().state_dict()}
    weights = {ours.get(name, name): value for name, value in weights.items()}
    return _build(build, weights, f"{folder}: the vision tower").to(dtype)


def _build(build: Callable[[], PreTrainedModel], weights: dict[str, Tensor], source: str) -> PreTrainedModel:
    """A model with these weights; they are compared before any memory is allocated for it."""
    with torch.device("meta"):
        _check_fit(build(), weights, source)
    model = build()
    _load(model, weights, source)
    return model


def _load(module: torch.nn.Module, weights: dict[str, Tensor], source: str) -> None:
    _check_fit(module, weights, source)
    check_finite(weights.items(), source)
    module.load_state_dict({name: weights[name] for name in module.state_dict()})


def _check_fit(module: torch.nn.Module, weights: dict[str, Tensor], source: str) -> None:
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in weights.items() if not name.endswith("rotary_emb.inv_freq")}
    check_weights(found, expected, source)
