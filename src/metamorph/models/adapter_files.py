"""Content of an adapter folder: names of its files, and checks before anything is built from them."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from torch import nn
from transformers import PreTrainedModel

from metamorph.files.model_files import check_weights, file_shapes, read_json_object

from .pretrained import LORA_CONFIG_FILE, hub_options


logger = logging.getLogger(__name__)

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
        raise ValueError(f"{file}: quantization has a field {min(unknown)}, which is no setting of 4-bit weights")
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
