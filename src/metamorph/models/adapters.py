"""Adapter folders: LoRA on the language model through PEFT, together with everything else that is trained.

Such a folder is written by `metamorph train --lora_enable True`: the LoRA matrices and their configuration in PEFT's
format, the connector file (connector, vision head, rows of the new tokens), the configuration, the processor, and
`metamorph_adapter.json`, which says what the adapter was trained on.
"""

import copy
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.utils import is_bitsandbytes_available, is_peft_available

from metamorph.files.model_files import (
    check_finite,
    check_implementations,
    check_weights,
    file_shapes,
    read_json_object,
)
from metamorph.files.permissions import save_file
from metamorph.flags.checks import DEVICE_MAPS
from metamorph.flags.extras import install_command

from .configuration_metamorph import MetaMorphConfig
from .connector import load_connector, save_connector
from .pretrained import (
    HUB_OPTIONS,
    LORA_CONFIG_FILE,
    hub_options,
    load_config,
    load_language_model,
    load_tokenizer,
    read_tensors,
)
from .vision_tower import load_vision_encoder


logger = logging.getLogger(__name__)

ADAPTER_NAME = "default"
PARTS_NOT_QUANTISED = ("model.vision_tower", "model.mm_projector", "vision_head", "lm_head")
"""Modules of a finished model that are not quantised with its language model; full names, as Transformers compares."""
BUILT_FIELDS = ("text_config", "vision_config", "image_token_id", "image_start_token_id", "image_end_token_id")
"""Fields of the configuration that follow from the parts."""
ADAPTER_FILE = "metamorph_adapter.json"
LORA_WEIGHTS_FILE = "adapter_model.safetensors"  # PEFT's name
PEFT_PREFIX = "base_model.model."  # PEFT's prefix of the names of weights in its files
LORA_FIELDS: dict[str, tuple[tuple[type, ...], float, float]] = {
    "r": ((int,), 1, 2**16),
    "lora_alpha": ((int, float), -1e6, 1e6),
    "lora_dropout": ((int, float), 0, 1),
    "use_rslora": ((bool,), 0, 1),
}
"""Fields that are read from PEFT's configuration -> types, smallest and largest value."""
IGNORED_LORA_FIELDS = (
    "auto_mapping",
    "base_model_name_or_path",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "megatron_core",
    "peft_type",
    "peft_version",
    "revision",
    "target_modules",
    "task_type",
)
"""Fields that are allowed but unused: the layers are those that have weights, and our own file names the base."""
QUANTIZATION_FIELDS = {
    "bnb_4bit_compute_dtype",
    "bnb_4bit_quant_storage",
    "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant",
    "llm_int8_skip_modules",
    "load_in_4bit",
    "quant_method",
}
"""Fields of a `BitsAndBytesConfig` that `metamorph train --bits 4` writes."""


@dataclass(frozen=True)
class AdapterBase:
    """What an adapter was trained on."""

    language_model: str  # folder or Hub id of a language model, or of a finished MetaMorph model
    vision_tower: str | None
    """Folder or Hub id of the vision tower; None with a finished MetaMorph model, which contains one."""
    quantization: dict[str, Any] | None = None
    """Fields of the language model's `BitsAndBytesConfig`; None when it was not quantised."""


def require_peft() -> None:
    """Raise `ModuleNotFoundError`, naming the extra, if PEFT is not installed."""
    if not is_peft_available():
        raise ModuleNotFoundError(f"LoRA adapters need the package peft: {install_command('lora')}", name="peft")


def require_bitsandbytes() -> None:
    """Raise `ModuleNotFoundError`, naming the extra, if bitsandbytes is not installed."""
    if not is_bitsandbytes_available():
        raise ModuleNotFoundError(
            f"4-bit and 8-bit language models need the package bitsandbytes: {install_command('lora')}",
            name="bitsandbytes",
        )


def has_adapter(model: PreTrainedModel) -> bool:
    """Whether LoRA matrices are attached to `model`."""
    return bool(getattr(model, "peft_config", None))


def save_adapter(
    model: PreTrainedModel, folder: str | Path, base: AdapterBase, state_dict: Mapping[str, Tensor] | None = None
) -> None:
    """Save the adapter and everything that is trained with it, except the processor.

    `state_dict` has the weights by their names in `model.state_dict()`, if those of `model` are sharded.
    """
    from peft import get_peft_model_state_dict

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = model.state_dict() if state_dict is None else dict(state_dict)
    # Without embeddings, for which PEFT would query the Hub: the new rows are in the connector file.
    lora = get_peft_model_state_dict(model, weights, ADAPTER_NAME, save_embedding_layers=False)
    lora = {f"{PEFT_PREFIX}{name}": value.detach().cpu().contiguous() for name, value in lora.items()}
    save_file(lora, folder / LORA_WEIGHTS_FILE, {"format": "pt"})
    settings = copy.deepcopy(model.peft_config[ADAPTER_NAME])
    settings.inference_mode, settings.base_model_name_or_path = True, base.language_model
    settings.save_pretrained(str(folder))
    save_connector(model, folder, weights)
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    text = json.dumps(asdict(base), indent=2, sort_keys=True)
    (folder / ADAPTER_FILE).write_text(text + "\n", encoding="utf-8")


def load_adapter_weights(model: PreTrainedModel, folder: str | Path) -> None:
    """Load an adapter folder, or a checkpoint of a LoRA run, into a model with the same LoRA matrices attached."""
    from peft import set_peft_model_state_dict

    file = Path(folder) / LORA_WEIGHTS_FILE
    tensors, _ = read_tensors(file)
    check_finite(tensors.items(), file)
    weights = {name.removeprefix(PEFT_PREFIX): value for name, value in tensors.items()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    expected = {
        name.replace(f".{ADAPTER_NAME}.", "."): tuple(value.shape)
        for name, value in model.state_dict().items()
        if ".lora_" in name
    }
    if found != expected:
        name = min(name for name in {*found, *expected} if found.get(name) != expected.get(name))
        raise ValueError(
            f"{file} does not fit this model: {name} has the shape {found.get(name, 'of nothing')} in the file and "
            f"{expected.get(name, 'of nothing')} in the model; use the --lora_r and --lora_target_modules, and the "
            "--model_name_or_path, that it was trained with"
        )
    set_peft_model_state_dict(model, weights, ADAPTER_NAME)
    load_connector(model, folder)


def load_adapter_folder(
    cls: Any,
    folder: Path,
    *,
    base: AdapterBase | None = None,
    dequantize: bool = False,
    output_loading_info: bool = False,
    **kwargs: Any,
) -> Any:
    """Load the base of an adapter folder by `cls`, and merge the adapter into it.

    An adapter on a 4-bit language model, or on one that `quantization_config` quantises, is not merged, because merged
    weights would have to be rounded again; with `dequantize` the language model is dequantised first, and the adapter
    merged.
    """
    require_peft()
    from peft import LoraConfig, PeftModel, inject_adapter_in_model

    base = read_adapter_base(folder) if base is None else base
    dequantize = dequantize and base.quantization is not None
    is_quantised = kwargs.get("quantization_config") is not None
    if is_quantised and base.quantization is not None:
        raise ValueError(f"the language model of the adapter {folder} is in 4 bits already: do not quantise it again")
    if kwargs.get("device_map") in DEVICE_MAPS:
        raise ValueError(
            f"the adapter {folder} is loaded on one device: to spread the model, merge it first "
            "(`metamorph convert --merge-adapter`)"
        )
    settings = read_lora_settings(folder)
    model = _build_base(cls, folder, base, dequantize, kwargs)
    config = LoraConfig(**settings, target_modules=lora_targets(model, folder, settings["r"]), inference_mode=True)
    if is_quantised or (base.quantization is not None and not dequantize):
        model = inject_adapter_in_model(config, model, ADAPTER_NAME)
        load_adapter_weights(model, folder)
    else:
        adapted = PeftModel(model, config, ADAPTER_NAME)
        load_adapter_weights(model, folder)
        model = adapted.merge_and_unload(safe_merge=True)
    model.generation_config = type(model.generation_config).from_pretrained(folder)
    model.eval()
    missing: dict[str, list[str]] = {"missing_keys": [], "unexpected_keys": []}
    return (model, missing) if output_loading_info else model


def _build_base(cls: Any, folder: Path, base: AdapterBase, dequantize: bool, kwargs: dict[str, Any]) -> Any:
    """The model an adapter was trained on, without the adapter, built as `metamorph train` builds it."""
    check_implementations(read_json_object(folder / "config.json"), folder / "config.json")
    config = MetaMorphConfig.from_pretrained(folder)
    if find_adapter_folder(base.language_model, {}) is not None:
        raise ValueError(
            f"the adapter {folder} names another adapter as its base ({base.language_model}): merge that first"
        )
    kwargs = {name: value for name, value in kwargs.items() if name not in ("config", *HUB_OPTIONS)}
    if base.quantization is not None:
        require_bitsandbytes()
        kwargs["quantization_config"] = BitsAndBytesConfig(**base.quantization)
    try:
        if _model_type(base.language_model, folder) == MetaMorphConfig.model_type:
            model = cls.from_pretrained(base.language_model, config=config, **kwargs)
            if dequantize:
                model = model.dequantize()
                forget_quantisation(model)
            return model
        language_model = load_language_model(base.language_model, **kwargs)
        tokenizer = load_tokenizer(base.language_model)
        encoder = load_vision_encoder(str(base.vision_tower))
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"the adapter {folder} was trained on {base.language_model}"
            + (f" and {base.vision_tower}" if base.vision_tower else "")
            + f", which cannot be loaded: {reason} Correct the paths in {folder / ADAPTER_FILE} where they have moved"
        ) from error
    if dequantize:
        language_model = language_model.dequantize()
    overrides = {name: getattr(config, name) for name in MetaMorphConfig.__annotations__ if name not in BUILT_FIELDS}
    model = cls.from_parts(language_model, encoder.to(language_model.dtype), tokenizer, **overrides)
    forget_quantisation(model)
    for name in BUILT_FIELDS[2:]:
        if getattr(model.config, name) != getattr(config, name):
            raise ValueError(
                f"the adapter {folder} was trained with {name}={getattr(config, name)}, but the tokenizer of "
                f"{base.language_model} now gives {getattr(model.config, name)}: it has changed since"
            )
    return model


def _model_type(name: str, folder: Path) -> str:
    """Model type of `name`, the base of the adapter in `folder`."""
    try:
        return load_config(name).model_type
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"the adapter {folder} was trained on {name}, which is not a model: {error} Correct the paths in "
            f"{folder / ADAPTER_FILE}"
        ) from error


def forget_quantisation(model: PreTrainedModel) -> None:
    """Remove the quantisation from the configuration: saved there, it would describe the saved weights."""
    for config in (model.config, model.config.text_config):
        if hasattr(config, "quantization_config"):
            del config.quantization_config


def is_adapter_folder(path: Any) -> bool:
    """Whether `path` is a local folder written by `save_adapter`."""
    return isinstance(path, (str, Path)) and (Path(path) / ADAPTER_FILE).is_file()


def find_adapter_folder(name: Any, hub_kwargs: Mapping[str, Any]) -> Path | None:
    """The local folder of an adapter, downloaded if it is on the Hub; None for everything else."""
    if is_adapter_folder(name):
        return Path(name)
    if not isinstance(name, str) or Path(name).exists():
        return None
    options = hub_options(hub_kwargs)
    try:
        hf_hub_download(name, ADAPTER_FILE, **options)
    except (EntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        logger.debug("%s is no adapter on the Hub: %s", name, error)  # if it is no model either, loading it will fail
        return None
    return Path(snapshot_download(name, **options))


def read_adapter_base(folder: str | Path) -> AdapterBase:
    """Read what the adapter in `folder` was trained on."""
    file = Path(folder) / ADAPTER_FILE
    fields = read_json_object(file)
    kinds = {"language_model": (str,), "vision_tower": (str, type(None)), "quantization": (dict, type(None))}
    for name, value in fields.items():
        if not isinstance(value, kinds.get(name, ())):
            raise ValueError(f"{file} is damaged: {name} cannot be {value!r}; copy the adapter folder again")
    if missing := {"language_model", "vision_tower"} - fields.keys():
        raise ValueError(f"{file} is damaged: it has no {min(missing)}; copy the adapter folder again")
    if unknown := (fields.get("quantization") or {}).keys() - QUANTIZATION_FIELDS:
        raise ValueError(f"{file}: quantization has a field {min(unknown)}, which is not a setting of 4-bit weights")
    return AdapterBase(**fields)


def read_lora_settings(folder: str | Path) -> dict[str, Any]:
    """Read rank, scale and dropout from `adapter_config.json`.

    PEFT's configuration can do more: import modules (`megatron_core`), load tokenizers and other adapters, multiply
    layers, and select layers by regular expressions that never end. An adapter here is plain LoRA on the layers that
    its weights name, so none of this is passed on, and what would change the result is refused by name.
    """
    from peft import LoraConfig

    file = Path(folder) / LORA_CONFIG_FILE
    config = read_json_object(file)
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{file}: peft_type {config.get('peft_type')!r} is not supported, only LORA")
    plain = LoraConfig().to_dict()
    for name, value in config.items():
        if name not in (*LORA_FIELDS, *IGNORED_LORA_FIELDS) and value and value != plain.get(name):
            raise ValueError(f"{file}: {name} {value!r} is not supported: adapters are plain LoRA of linear layers")
    settings = {name: config.get(name, plain[name]) for name in LORA_FIELDS}
    for name, (kinds, least, most) in LORA_FIELDS.items():
        if type(settings[name]) not in kinds or not least <= settings[name] <= most:
            raise ValueError(f"{file}: {name} cannot be {settings[name]!r}; copy the adapter folder again")
    return settings


def lora_targets(model: PreTrainedModel, folder: str | Path, rank: int) -> list[str]:
    """List the linear layers of `model` with LoRA matrices of this rank in an adapter folder, by the file's header."""
    file = Path(folder) / LORA_WEIGHTS_FILE
    found = file_shapes(file)
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    paths = sorted({name.removeprefix(PEFT_PREFIX).rpartition(".lora_")[0] for name in found})
    unknown = [path for path in paths if path not in linear]
    if unknown or not paths:
        found_instead = unknown[0] if unknown else "it is empty"
        raise ValueError(f"{file} holds no LoRA matrices of linear layers of its base: {found_instead}")
    expected: dict[str, tuple[int, ...]] = {}
    for path in paths:
        expected[f"{PEFT_PREFIX}{path}.lora_A.weight"] = (rank, linear[path].in_features)
        expected[f"{PEFT_PREFIX}{path}.lora_B.weight"] = (linear[path].out_features, rank)
    check_weights(found, expected, file)
    return paths
