"""Checks of flag values with errors that name the flag; help texts from docstrings; text that is safe to print."""

import ast
import inspect
import os
import re
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from metamorph.flags.parser import file_in_the_way, unknown_choice


HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
TOWER_TYPES = ("siglip", "clip", "dinov2")
"""Prefixes of the model types of vision towers."""
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
"""Values of `device_map` that spread a model over all devices."""
HUB_TIMEOUT = 10
"""Seconds to wait for the Hub to say whether a model exists."""

# What controls a terminal (tab and newline are allowed), reverses the direction of text, or is half a character.
_CONTROL_CHARACTERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class RemembersGiven:
    """Base of a dataclass of flags that remembers which of them were given, even with their default value."""

    # Flags that are refused: name -> accepted values, the default first, and why no other value is accepted.
    unsupported: ClassVar[Mapping[str, tuple[tuple[Any, ...], str]]] = {}
    _given: frozenset[str]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:  # noqa: D102 - the class says it
        flags = super().__new__(cls)
        names = [field.name for field in fields(cls) if field.init]  # type: ignore[arg-type]
        flags._given = frozenset(names[: len(args)]) | frozenset(kwargs)
        return flags

    def is_given(self, name: str) -> bool:
        """Whether the field `name` was given when the object was built."""
        return name in self._given

    def check_values(self) -> None:
        """Refuse values that are not supported, or not among the `choices` in the metadata of their field."""
        for name, (accepted, reason) in self.unsupported.items():
            value = getattr(self, name, accepted[0])  # older versions of Transformers lack some of them
            if value not in accepted:
                raise ValueError(f"--{name} {value} is not supported: {reason}")
        for field in fields(self):  # type: ignore[arg-type]
            if "choices" in field.metadata and (value := getattr(self, field.name)) is not None:
                check_choice(f"--{field.name}", value, tuple(field.metadata["choices"]))


def attribute_docs(kind: type) -> dict[str, str]:
    """Docstrings of the fields of a class and its bases (ours only), by field, each on one line."""
    docs = {}
    for cls in reversed(kind.__mro__):
        if not cls.__module__.startswith("metamorph."):
            continue  # the fields of `transformers.TrainingArguments` have their own help texts
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body  # type: ignore[attr-defined]
        for field, below in pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(field.target, ast.Name):
                text = getattr(below.value, "value", None)
                if isinstance(text, str):
                    docs[field.target.id] = " ".join(text.split())
    return docs


def printable(text: str) -> str:
    """Escape control characters, since names and paths may come from untrusted data; tabs and newlines stay."""
    return _CONTROL_CHARACTERS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def check_choice(flag: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise a `ValueError` that names flag, value and choices if `value` is not one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{flag} {unknown_choice(value, allowed)}")


def check_model_reference(name: str, flag: str, file: str = "config.json") -> None:
    """Raise a `FileNotFoundError` unless `name` is a folder with `file` or can be a Hub id, without network access."""
    folder = Path(name)
    if os.path.isdir(name):
        if not (folder / file).is_file():
            expected = "the output of `metamorph train-visualizer`" if file == "model_index.json" else "a model folder"
            raise FileNotFoundError(f"{flag} {name} is a folder without {file}: give {expected}")
        return
    # `out/model` is a mistyped path rather than a Hub id if there is a local folder `out`.
    is_path = HUB_ID.fullmatch(name) is None or (folder.parent != Path(".") and os.path.isdir(folder.parent))
    if is_path or name.upper().startswith("PATH_TO"):
        raise FileNotFoundError(f"{flag} {name} does not exist: give an existing model folder or a Hub id (owner/name)")


def check_reachable(name: str, flag: str, file: str = "config.json") -> None:
    """Raise a `FileNotFoundError` unless `name` is a folder with `file`, or the Hub or its cache has it.

    Asks the Hub at most once; not being able to reach it is an error, too.
    """
    check_model_reference(name, flag, file)
    if Path(name).is_dir() or isinstance(try_to_load_from_cache(name, file), str):
        return
    try:
        get_hf_file_metadata(hf_hub_url(name, file), timeout=HUB_TIMEOUT)
    except (OSError, HTTPError) as error:
        raise FileNotFoundError(f"{flag} {name} {_hub_reason(error, name, file) or error}") from error


def check_metamorph_model(name: str, flag: str) -> None:
    """Check from its configuration that `name` is a trained MetaMorph model, before any weights are loaded.

    Raises `FileNotFoundError` as `check_reachable` does or for missing weights, `ValueError` for another model.
    """
    from metamorph.files.model_files import read_json_object  # imports PyTorch

    check_reachable(name, flag)
    folder = Path(name)
    with errors_name_flag(flag, name):
        file = folder / "config.json" if folder.is_dir() else Path(hf_hub_download(name, "config.json"))
        config = read_json_object(file)
    if config.get("model_type") != "metamorph":
        raise ValueError(
            f"{flag} {name} is {_kind_of(config)}, not a MetaMorph model: give the output of stage 2 of `metamorph "
            "train`, or mini"
        )
    if folder.is_dir() and not any(folder.glob("*model*.safetensors*")):
        reason = "has no model weights: give the output of stage 2 of `metamorph train`"
        if (folder / "mm_projector.safetensors").is_file():
            reason = (
                "has no model weights, but a connector: it is the output of stage 1. Train stage 2 with "
                f"--pretrain_mm_mlp_adapter {name}, and give its output"
            )
        raise FileNotFoundError(f"{flag} {name} {reason}")


def refuse_tower(config: dict[str, Any], name: str, flag: str) -> None:
    """Raise a `ValueError` if `config` describes a vision tower where a language model is expected."""
    if (kind := _kind_of(config)).startswith("a vision tower"):
        raise ValueError(f"{flag} {name} is {kind}: pass it as --vision_tower, and a language model as {flag}")


def check_output_folder(folder: str, flag: str) -> None:
    """Raise a `NotADirectoryError` if `folder`, or a parent of it, is a file."""
    if (file := file_in_the_way(Path(folder).expanduser())) is not None:
        raise NotADirectoryError(f"{flag} {folder} cannot be written to: {file} is a file; give a folder")


@contextmanager
def errors_name_flag(flag: str, value: str) -> Iterator[None]:
    """Turn the errors of Transformers and diffusers for a missing or unknown model into ones that name the flag."""
    try:
        yield
    except OSError as error:
        if f"{flag} {value} " in str(error):
            raise
        reason = str(error).strip().splitlines()[0]
        causes = [] if os.path.isdir(value) else [error, error.__cause__, error.__context__]
        of_hub = next(filter(None, (_hub_reason(cause, value, "model") for cause in causes if cause)), None)
        raise FileNotFoundError(f"{flag} {value} {of_hub or f'cannot be loaded: {reason}'}") from error
    except (ValueError, KeyError) as error:
        message = str(error)
        if flag in message:
            raise
        raise ValueError(f"{flag} {value} cannot be used: {message}") from error


def _kind_of(config: dict[str, Any]) -> str:
    """What a configuration of Transformers describes, in words."""
    model_type, architectures = config.get("model_type"), config.get("architectures")
    name = str(architectures[0] if isinstance(architectures, list) and architectures else model_type)
    if name.endswith("ForCausalLM"):
        return f"a plain language model ({name})"
    is_tower = "vision" in name.lower() or str(model_type).startswith(TOWER_TYPES)
    return f"a vision tower ({name})" if is_tower else f"another model ({name})"


def _hub_reason(error: BaseException, name: str, file: str) -> str | None:
    """What an error of the Hub means and how to fix it, on one line; None for other errors."""
    login = "log in (`hf auth login`, or set HF_TOKEN)"
    if isinstance(error, GatedRepoError):
        return f"is gated on the Hub: accept its licence at https://huggingface.co/{name}, and {login}"
    if isinstance(error, OfflineModeIsEnabled):
        return (
            "is neither a local folder nor in the Hub's cache, and HF_HUB_OFFLINE is set: give an existing folder, or "
            "unset HF_HUB_OFFLINE"
        )
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, RepositoryNotFoundError) or status in (401, 403):
        return (
            "is not a local folder, and there is no such model on the Hub that you may read: check the path or name; "
            f"if it is private, {login}"
        )
    if status == 404:
        return f"is not a local folder, and the Hub has no {file} of that name: check the path or name"
    if isinstance(error, HfHubHTTPError):
        return f"is not a local folder, and the Hub answers with status {status}: try again later"
    if isinstance(error, (HTTPError, ConnectionError, TimeoutError)):
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"is not a local folder, and the Hub cannot be reached ({reason}): check the name or the network"
    return None
