"""The one way to models of others: read as data only, whole and finite, or refused by name.

Transformers asks on stdin whether to run code of a folder, starts weights that a checkpoint lacks at random, and takes
NaN for a number. Here no code is run, and a model has exactly the weights that its configuration describes. Names and
shapes are compared by headers first, so that a configuration cannot ask for more memory than its files hold.
"""

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, StrictDataclassError
from torch import nn
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

from metamorph.files.model_files import check_finite, check_implementations, read_json_object, weight_shapes


CONFIG_FILE = "config.json"
PEFT_FILE = "adapter_config.json"
WEIGHT_PATTERNS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
HUB_OPTIONS = ("cache_dir", "local_files_only", "revision", "token")
OTHER_SOURCES = ("gguf_file", "state_dict", "subfolder", "variant")
"""Arguments of `from_pretrained` with which the weights are not those of `WEIGHT_PATTERNS`."""
PARTS_BESIDE_THE_TEXT = (
    r"(^|\.)(vision|visual|image|audio|speech|multi_modal|mm|embed_vision|embed_audio|mtp)(_\w+)?\."
    r"|rotary_emb\.inv_freq$"
)
"""What the checkpoint of a language model may hold unread: encoders and connectors of multimodal models, layers that
predict several tokens, and tables that older releases of Transformers saved."""
VALUES_PER_ELEMENT = 32
"""Values that one element of a quantised tensor can hold at most: of one bit each in an int32."""


def load_config(name_or_path: str | Path, kind: Any = AutoConfig, **hub_kwargs: Any) -> PreTrainedConfig:
    """Read the configuration of a model.

    Args:
        name_or_path: Folder or Hub id.
        kind: Class that reads it; by default the one that it names.
        **hub_kwargs: `revision`, `token`, …

    Raises:
        OSError: if there is none.
        ValueError: if it is damaged, of an unknown kind, or asks for code of the Hub.
    """
    options = {name: hub_kwargs[name] for name in HUB_OPTIONS if hub_kwargs.get(name) is not None}
    if (file := cached_file(name_or_path, CONFIG_FILE, **options)) is not None:
        check_implementations(read_json_object(Path(file)), file)
    remote_code = {"trust_remote_code": False} if kind is AutoConfig else {}
    try:
        return kind.from_pretrained(name_or_path, **remote_code, **hub_kwargs)
    except (StrictDataclassError, TypeError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ValueError(f"{name_or_path}: {CONFIG_FILE} is not the configuration of a model ({reason})") from error


def load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a language model.

    Args:
        name_or_path: Folder or Hub id.
    """
    return AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)


def load_language_model(name_or_path: str, **kwargs: Any) -> PreTrainedModel:
    """Load a language model with its head.

    Args:
        name_or_path: Folder or Hub id.
        **kwargs: Of `from_pretrained`, such as `dtype`.

    Raises:
        OSError: if there is none.
        ValueError: as `load_checked`.
    """
    config = load_config(name_or_path, **{name: kwargs[name] for name in HUB_OPTIONS if name in kwargs})

    def build() -> nn.Module:
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=False)

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
    """Load a model whose weights must all be there, be known, have the right shapes, and be finite.

    Args:
        load: `from_pretrained` of its class.
        name_or_path: Folder or Hub id.
        config: Result of `load_config`.
        build: Builds the model for `config`; called under `torch.device("meta")`.
        unread: Regular expression of the names that a checkpoint may hold though the model does not know them.
        **kwargs: Of `from_pretrained`.

    Returns:
        The model, and Transformers' account of the weights, as with `output_loading_info=True`.

    Raises:
        OSError: if there is no such model.
        ValueError: naming the first weight that is not as it should be, and how many there are.
    """
    if kwargs.pop("trust_remote_code", None):
        raise ValueError("trust_remote_code is not supported: code that comes with a model is never run")
    _refuse_peft(name_or_path, kwargs)
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
    # Not those that stay on the disk, nor those of eight bits and less, for which there are no comparisons.
    values = ((name, value) for name, value in model.state_dict().items() if value.device.type != "meta")
    check_finite(((name, value) for name, value in values if value.element_size() > 1), name_or_path)
    return model, info


def find_file(name_or_path: str | Path, file: str, **hub_kwargs: Any) -> Path | None:
    """A file of a folder or of the Hub, which is downloaded; None if there is none, or the Hub cannot be reached.

    Args:
        name_or_path: Folder or Hub id.
        file: Name of the file.
        **hub_kwargs: `revision`, `token`, …, and `subfolder`.
    """
    options = {name: hub_kwargs[name] for name in (*HUB_OPTIONS, "subfolder") if hub_kwargs.get(name) is not None}
    absent_is_none = {
        f"_raise_exceptions_for_{what}": False for what in ("gated_repo", "missing_entries", "connection_errors")
    }
    found = cached_file(name_or_path, file, **options, **absent_is_none)
    return None if found is None else Path(found)


def check_layers(config: PreTrainedConfig, weights: int, where: object) -> None:
    """Check that no part has more layers than there are weights, before so many layers are built.

    Args:
        config: Configuration of a model.
        weights: Number of tensors in its files.
        where: Folder that the error message names.

    Raises:
        ValueError: if there are too many.
    """
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        layers = getattr(part, "num_hidden_layers", None)
        if isinstance(layers, int) and layers > weights:
            raise ValueError(f"{where}: {CONFIG_FILE} asks for {layers} layers, but there are only {weights} weights")


def _check_sizes(
    name_or_path: str | Path, config: PreTrainedConfig, build: Callable[[], nn.Module], kwargs: dict[str, Any]
) -> None:
    """Compare what the configuration asks for with what the files hold, before any memory is taken."""
    folder = _weight_folder(name_or_path, kwargs)
    if folder is None or is_deepspeed_zero3_enabled():  # which would divide the model among processes
        return
    found = weight_shapes(folder)
    check_layers(config, len(found), folder)
    with torch.device("meta"):
        model = build()
    # Totals, since some names are others in the files: Transformers renames, splits and joins weights.
    tied = getattr(model, "all_tied_weights_keys", {})
    expected = {name: tuple(value.shape) for name, value in model.named_parameters() if name not in tied}
    held = sum(map(_numel, found.values()))
    if getattr(config, "quantization_config", None) is not None:
        held *= VALUES_PER_ELEMENT
    if sum(map(_numel, expected.values())) > held:
        wrong = {name: shape for name, shape in expected.items() if found.get(name) != shape}
        name = max(wrong, key=lambda name: _numel(wrong[name]))
        raise ValueError(
            f"{folder} holds less than its {CONFIG_FILE} asks for: {name} must have shape {list(wrong[name])}, but "
            + (f"has {list(found[name])}" if name in found else "is not there")
            + f" ({len(wrong)} such weights)"
        )


def _refuse_peft(name_or_path: str | Path, kwargs: dict[str, Any]) -> None:
    """Transformers would attach an adapter that lies in the folder of a model, and PEFT read its settings unchecked."""
    if find_file(name_or_path, PEFT_FILE, **kwargs) is not None:
        raise ValueError(
            f"{name_or_path} holds {PEFT_FILE} beside a model: move the adapter to a folder of its own, with the "
            "metamorph_adapter.json that `metamorph train --lora_enable True` writes"
        )


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _weight_folder(name_or_path: str | Path, kwargs: dict[str, Any]) -> Path | None:
    """The local folder of the weights, which are downloaded if need be; None if they are not in the usual files."""
    if any(kwargs.get(name) is not None for name in OTHER_SOURCES):
        return None
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    hub = {name: kwargs[name] for name in HUB_OPTIONS if kwargs.get(name) is not None}
    try:
        folder = Path(snapshot_download(str(name_or_path), allow_patterns=list(WEIGHT_PATTERNS), **hub))
    except (HfHubHTTPError, OSError, ValueError):
        return None  # `from_pretrained` will say what is wrong
    return folder if any(folder.glob("*.safetensors")) else None


@contextmanager
def _without_report() -> Iterator[None]:
    """Hides Transformers' table of weights that do not fit: one line of ours says it."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
