"""Loading models from untrusted sources: as data only, with complete and finite weights, or refused by name.

Transformers asks on stdin whether to run the code of a folder, initialises missing weights at random, and accepts NaN.
Here no code is run, and a model has exactly the weights that its configuration describes. Names and shapes are
compared by headers first, so a configuration cannot ask for more memory than its files hold.
"""

import copy
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from metamorph.files.model_files import (
    check_finite,
    check_implementations,
    load_pickled_tensors,
    read_json_object,
    weight_shapes,
)


CONFIG_FILE = "config.json"
LORA_CONFIG_FILE = "adapter_config.json"
WEIGHT_PATTERNS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
HUB_OPTIONS = ("cache_dir", "local_files_only", "revision", "token")
OTHER_SOURCES = ("gguf_file", "state_dict", "subfolder", "variant")
"""Arguments of `from_pretrained` with which the weights are not those of `WEIGHT_PATTERNS`."""
PARTS_BESIDE_THE_TEXT = (
    r"(^|\.)(vision|visual|image|audio|speech|multi_modal|mm|embed_vision|embed_audio|mtp)(_\w+)?\."
    r"|rotary_emb\.inv_freq$"
)
"""Weights of a language model's checkpoint that are not read: encoders and connectors of multimodal models, layers for
multi-token prediction, and tables that older releases of Transformers saved."""
VALUES_PER_ELEMENT = 32  # most values in one element of a quantised tensor: of one bit each in an int32


def hub_options(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `from_pretrained` that say where on the Hub a model is."""
    return {name: kwargs[name] for name in HUB_OPTIONS if kwargs.get(name) is not None}


def load_config(name_or_path: str | Path, kind: Any = AutoConfig, **hub_kwargs: Any) -> PreTrainedConfig:
    """Load the configuration of a model from a folder or the Hub; `kind` is its class, by default the one it names.

    A damaged one, an unknown kind, and code of the Hub are a `ValueError`.
    """
    if (file := cached_file(name_or_path, CONFIG_FILE, **hub_options(hub_kwargs))) is not None:
        check_implementations(read_json_object(Path(file)), file)
    remote_code = {"trust_remote_code": False} if kind is AutoConfig else {}
    try:
        return kind.from_pretrained(name_or_path, **remote_code, **hub_kwargs)
    except (StrictDataclassError, TypeError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ValueError(f"{name_or_path}: {CONFIG_FILE} is not the configuration of a model ({reason})") from error


def load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a language model, from a folder or the Hub."""
    return AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)


def load_language_model(name_or_path: str, **kwargs: Any) -> PreTrainedModel:
    """Load a language model with its head, from a folder or the Hub, by [`load_checked`]."""
    config = load_config(name_or_path, **hub_options(kwargs))
    build = partial(AutoModelForCausalLM.from_config, copy.deepcopy(config), trust_remote_code=False)
    return load_checked(
        AutoModelForCausalLM.from_pretrained, name_or_path, config, build, PARTS_BESIDE_THE_TEXT, **kwargs
    )[0]


def load_checked(
    load: Callable[..., tuple[Any, dict[str, Any]]],
    name_or_path: str | Path,
    config: PreTrainedConfig,
    build: Callable[[], nn.Module],
    unread: str | None = None,
    **kwargs: Any,
) -> tuple[Any, dict[str, Any]]:
    """Load a model and check that its weights are complete, known, of the right shapes, and finite.

    `load` is `from_pretrained` of its class, `config` a result of `load_config`, and `build` makes a model of it under
    `torch.device("meta")`. The checkpoint may have weights that match the regular expression `unread`. Returns the
    model and Transformers' loading info.
    """
    if kwargs.pop("trust_remote_code", None):
        raise ValueError("trust_remote_code is not supported: code that comes with a model is never run")
    # Transformers would attach an adapter in the folder of a model, and PEFT read its settings unchecked.
    if find_file(name_or_path, LORA_CONFIG_FILE, **kwargs) is not None:
        raise ValueError(
            f"{name_or_path} holds {LORA_CONFIG_FILE} next to a model: move the adapter to a folder of its own, with "
            "the metamorph_adapter.json that `metamorph train --lora_enable True` writes"
        )
    _check_sizes(name_or_path, config, build, kwargs)
    if all(kwargs.get(name) is None for name in OTHER_SOURCES):
        kwargs["use_safetensors"] = True
    kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True, "trust_remote_code": False}
    with _without_report():
        model, info = load(name_or_path, **kwargs)
    if missing := info["missing_keys"]:
        raise ValueError(f"{name_or_path} lacks {len(missing)} weights, for example {min(missing)}: copy it again")
    if unknown := [name for name in info["unexpected_keys"] if unread is None or not re.search(unread, name)]:
        raise ValueError(
            f"{name_or_path} holds {len(unknown)} weights that a {type(model).__name__} does not have, for example "
            f"{min(unknown)}: its {CONFIG_FILE} belongs to another model"
        )
    if mismatched := info["mismatched_keys"]:
        name, found, expected = min(mismatched)
        raise ValueError(
            f"{name_or_path}: {name} has shape {list(found)}, but its configuration asks for {list(expected)} "
            f"({len(mismatched)} such weights)"
        )
    # Not weights offloaded to disk, nor those of eight bits and less, which cannot be compared.
    values = ((name, value) for name, value in model.state_dict().items() if value.device.type != "meta")
    check_finite(((name, value) for name, value in values if value.element_size() > 1), name_or_path)
    return model, info


def read_tensors(file: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """Read tensors and metadata of a `.safetensors` file, or of a `.bin` file without running any code in it."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: copy the folder again")
    if file.suffix != ".safetensors":
        return load_pickled_tensors(file), {}
    try:
        with safe_open(file, framework="pt") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}, handle.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}): copy it again") from error


def find_file(name_or_path: str | Path, file: str, **hub_kwargs: Any) -> Path | None:
    """Find a file in a folder or on the Hub, and download it; None if there is none, or the Hub cannot be reached."""
    options = hub_options(hub_kwargs)
    if hub_kwargs.get("subfolder") is not None:
        options["subfolder"] = hub_kwargs["subfolder"]
    for what in ("gated_repo", "missing_entries", "connection_errors"):
        options[f"_raise_exceptions_for_{what}"] = False
    found = cached_file(name_or_path, file, **options)
    return None if found is None else Path(found)


def check_layers(config: PreTrainedConfig, weights: int, where: object) -> None:
    """Check that no part has more layers than `weights`, the number of tensors in the files, before they are built."""
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        layers = getattr(part, "num_hidden_layers", None)
        if isinstance(layers, int) and layers > weights:
            raise ValueError(f"{where}: {CONFIG_FILE} asks for {layers} layers, but there are only {weights} weights")


def _check_sizes(
    name_or_path: str | Path, config: PreTrainedConfig, build: Callable[[], nn.Module], kwargs: dict[str, Any]
) -> None:
    """Compare what the configuration asks for with what the files hold, before any memory is allocated."""
    folder = _weight_folder(name_or_path, kwargs)
    if folder is None or is_deepspeed_zero3_enabled():  # ZeRO-3 would shard the model
        return
    found = weight_shapes(folder)
    check_layers(config, len(found), folder)
    with torch.device("meta"):
        model = build()
    # Totals, because names in the files may differ: Transformers renames, splits and joins weights.
    tied = getattr(model, "all_tied_weights_keys", {})
    expected = {name: tuple(value.shape) for name, value in model.named_parameters() if name not in tied}
    held = sum(map(math.prod, found.values()))
    if getattr(config, "quantization_config", None) is not None:
        held *= VALUES_PER_ELEMENT
    if sum(map(math.prod, expected.values())) > held:
        wrong = {name: shape for name, shape in expected.items() if found.get(name) != shape}
        name = max(wrong, key=lambda name: math.prod(wrong[name]))
        raise ValueError(
            f"{folder} holds less than its {CONFIG_FILE} asks for: {name} must have shape {list(wrong[name])}, but "
            + (f"has {list(found[name])}" if name in found else "is not there")
            + f" ({len(wrong)} such weights)"
        )


def _weight_folder(name_or_path: str | Path, kwargs: dict[str, Any]) -> Path | None:
    """The local folder of the weights, downloaded if necessary; None if they are not in the usual files."""
    if any(kwargs.get(name) is not None for name in OTHER_SOURCES):
        return None
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    try:
        folder = Path(snapshot_download(str(name_or_path), allow_patterns=list(WEIGHT_PATTERNS), **hub_options(kwargs)))
    except (HfHubHTTPError, OSError, ValueError):
        return None  # `from_pretrained` reports what is wrong
    return folder if any(folder.glob("*.safetensors")) else None


@contextmanager
def _without_report() -> Iterator[None]:
    """Silence Transformers' report of weights that do not fit: our errors name them."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
