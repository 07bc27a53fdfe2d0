"""Checkpoints in the layout of the original MetaMorph: one Llama with the other parts inside, read as ours.

Names: `model.embed_tokens`, `model.layers.*`, `model.norm` and `lm_head` of Llama, `model.vision_tower.vision_tower.*`
of the tower (absent where it was not saved), `model.mm_projector.*`, `vision_head.*`, and `model.vision_proj.*`, which
nothing uses. The configuration is Llama's with fields of LLaVA in it.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from metamorph.files.model_files import check_finite, load_pickled_tensors, read_json_object, shard_names
from metamorph.models.sequence.image_tokens import image_token_names

from .configuration_metamorph import MetaMorphConfig
from .image_processing import load_image_processor
from .modeling_metamorph import MetaMorphForConditionalGeneration
from .pretrained import check_layers, load_tokenizer
from .processing_metamorph import MetaMorphProcessor
from .vision_tower import load_vision_config, load_vision_encoder, resolve_vision_tower


logger = logging.getLogger(__name__)

MODEL_TYPES = ("metamorph_llama", "llava_llama", "llama")
TEMPLATE = "llama3_original"
"""The conversation template that such models were trained with."""
WEIGHT_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
SHARED_FIELDS = (
    "apply_softmax",
    "image_token_reduction",
    "mm_projector_type",
    "mm_use_im_patch_token",
    "mm_use_im_start_end",
    "mm_vision_select_layer",
    "normalize_vision",
    "num_image_tokens",
    "use_vision_ar",
    "vision_coef",
)
"""Fields of the original's configuration that ours has under the same name."""
TOWER_PREFIX = "model.vision_tower.vision_tower."
CONNECTOR_PREFIX = "model.mm_projector."
HEAD_PREFIX = "vision_head."
UNUSED_PREFIX = "model.vision_proj."


@dataclass
class OriginalWeights:
    """A checkpoint's tensors by part, each named as the part itself names them."""

    language_model: dict[str, Tensor]
    """As of `LlamaForCausalLM`."""
    vision_tower: dict[str, Tensor]
    """As of the vision encoder, without the prefix `vision_model.`; empty where the tower was not saved."""
    mm_projector: dict[str, Tensor]
    """Of the connector."""
    vision_head: dict[str, Tensor]
    """Of the vision head."""


def load_original(
    folder: str | Path,
    *,
    tokenizer: str | None = None,
    vision_tower: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[MetaMorphForConditionalGeneration, MetaMorphProcessor]:
    """Load a checkpoint of the original system as a model and a processor of ours.

    Args:
        folder: With `config.json` and the weights, as safetensors or as `.bin` files of tensors only.
        tokenizer: Folder or Hub id of its tokenizer; by default `folder`.
        vision_tower: Folder or Hub id of the tower, for its configuration and image processor, and for its weights
            where the checkpoint has none; by default what the configuration names.
        dtype: Of the weights.

    Raises:
        FileNotFoundError: If the folder lacks the configuration or the weights.
        ValueError: If the checkpoint is none of that layout, or does not fit its configuration.
    """
    folder = Path(folder)
    fields = read_config(folder)
    weights = split_weights(read_weights(folder), folder)
    tower_name = vision_tower or fields.get("mm_vision_tower")
    if tower_name is None:
        raise ValueError(f"{folder / 'config.json'} names no mm_vision_tower: give it as --vision-tower")
    text_tokenizer = load_tokenizer(tokenizer or folder)
    overrides = _overrides(fields, weights, folder)
    _add_known_tokens(text_tokenizer, overrides)
    model = MetaMorphForConditionalGeneration.from_parts(
        _language_model(fields, weights.language_model, dtype, folder),
        _vision_encoder(tower_name, weights.vision_tower, dtype, folder),
        text_tokenizer,
        **overrides,
    )
    _load(model.model.mm_projector, weights.mm_projector, f"{folder}: mm_projector")
    _load(model.vision_head, weights.vision_head, f"{folder}: vision_head")
    aspect_ratio = fields.get("image_aspect_ratio", "square")
    processor = MetaMorphProcessor.from_parts(
        text_tokenizer,
        load_image_processor(resolve_vision_tower(tower_name)),
        model.config,
        image_aspect_ratio=aspect_ratio if aspect_ratio in ("square", "pad") else "square",
    )
    model.generation_config.eos_token_id = processor.end_of_turn_token_ids
    return model.eval(), processor


def read_config(folder: Path) -> dict[str, Any]:
    """The fields of an original checkpoint's `config.json`.

    Args:
        folder: Folder of the checkpoint.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no config.json: give the folder of an original checkpoint")
    fields = read_json_object(file)
    if fields.get("model_type") not in MODEL_TYPES:
        raise ValueError(
            f"{file} has model_type {fields.get('model_type')!r}, which is no checkpoint of the original layout; those "
            f"have one of {', '.join(MODEL_TYPES)}"
        )
    return fields


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint; its files can run no code when they are read.

    Args:
        folder: With `model.safetensors`, `pytorch_model.bin`, or shards of either and their index.
    """
    name = next((name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if name is None:
        raise FileNotFoundError(f"{folder} has no weights: one of {', '.join(WEIGHT_FILES)} is needed")
    files = [folder / name]
    if name.endswith(".index.json"):
        files = [folder / shard for shard in shard_names(folder / name)]
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors.update(_read_file(file))
    return tensors


def split_weights(tensors: Mapping[str, Tensor], folder: Path) -> OriginalWeights:
    """Sort a checkpoint's tensors by part.

    Args:
        tensors: Result of `read_weights`.
        folder: Where they come from, for messages.
    """
    weights = OriginalWeights({}, {}, {}, {})
    for name, value in tensors.items():
        if name.startswith(TOWER_PREFIX):
            rest = name.removeprefix(TOWER_PREFIX).removeprefix("vision_model.")
            if not rest.startswith("head."):  # pooling, which is never read
                weights.vision_tower[rest] = value
        elif name.startswith(CONNECTOR_PREFIX):
            weights.mm_projector[name.removeprefix(CONNECTOR_PREFIX)] = value
        elif name.startswith(HEAD_PREFIX):
            weights.vision_head[name.removeprefix(HEAD_PREFIX)] = value
        elif not name.startswith(UNUSED_PREFIX):
            weights.language_model[name] = value
    if not weights.mm_projector or not weights.vision_head:
        raise ValueError(
            f"{folder} holds no {CONNECTOR_PREFIX}* or no {HEAD_PREFIX}*: it is not a finished model of the original "
            "layout (for a connector of stage 1, give its mm_projector.bin)"
        )
    return weights


def _overrides(fields: Mapping[str, Any], weights: OriginalWeights, folder: Path) -> dict[str, Any]:
    """The configuration of ours; what the original's does not say is as in the released model."""
    overrides: dict[str, Any] = {name: fields[name] for name in SHARED_FIELDS if fields.get(name) is not None}
    absent = sorted(set(SHARED_FIELDS) - set(overrides))
    if absent:
        logger.info("%s does not say %s: our defaults are taken", folder / "config.json", ", ".join(absent))
    layers = {name.partition(".")[0] for name in weights.vision_head}
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


def _add_known_tokens(tokenizer: PreTrainedTokenizerBase, overrides: Mapping[str, Any]) -> None:
    """Add the image tokens as tokens that the language model knows: `from_parts` keeps the rows of those."""
    names = image_token_names(
        mm_use_im_start_end=overrides.get("mm_use_im_start_end", MetaMorphConfig.mm_use_im_start_end),
        mm_use_im_patch_token=overrides.get("mm_use_im_patch_token", MetaMorphConfig.mm_use_im_patch_token),
    )
    tokenizer.add_tokens(names, special_tokens=True)


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
        logger.info("%s holds no vision tower: it is loaded from %s", folder, name)
        return load_vision_encoder(name, dtype)
    config = load_vision_config(name)
    if hasattr(config, "vision_use_head"):
        config.vision_use_head = False
    check_layers(config, len(weights), folder)

    def build() -> PreTrainedModel:
        return AutoModel.from_config(config, trust_remote_code=False)

    with torch.device("meta"):
        # Some versions of Transformers put `vision_model.` in front of the encoder's names.
        ours = {name.removeprefix("vision_model."): name for name in build().state_dict()}
    weights = {ours.get(name, name): value for name, value in weights.items()}
    return _build(build, weights, f"{folder}: the vision tower").to(dtype)


def _build(build: Callable[[], PreTrainedModel], weights: dict[str, Tensor], source: str) -> PreTrainedModel:
    """A model with these weights; compared before memory is taken for it."""
    with torch.device("meta"):
        _check_fit(build(), weights, source)
    model = build()
    _load(model, weights, source)
    return model


def _load(module: torch.nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """`load_state_dict` that tells what does not fit."""
    _check_fit(module, weights, source)
    check_finite(weights.items(), source)
    module.load_state_dict({name: weights[name] for name in module.state_dict()})


def _check_fit(module: torch.nn.Module, weights: dict[str, Tensor], source: str) -> None:
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in weights.items() if not name.endswith("rotary_emb.inv_freq")}
    if found != expected:
        name = min(name for name in {*found, *expected} if found.get(name) != expected.get(name))
        raise ValueError(
            f"{source} does not fit its configuration: {name} has the shape {found.get(name, 'of nothing')} in the "
            f"checkpoint, and {expected.get(name, 'of nothing')} is needed"
        )


def _read_file(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: copy the checkpoint again")
    if file.suffix != ".safetensors":
        return load_pickled_tensors(file)
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} cannot be read as plain tensors ({error}): it is damaged, copy it again") from error
