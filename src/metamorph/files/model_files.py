"""Model folders from untrusted sources: JSON and weight files, checked before anything is built from them."""

from __future__ import annotations

import json
import math
import pickle
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open


JSON_LIMIT = 32 * 2**20
"""Bytes; the longest known index of sharded weights has a third of it."""

BUILD_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError),
    *(StrictDataclassError, TypeError, ValueError),
)
"""What classes of Transformers and diffusers raise for values, or calls, that they do not support."""

_PICKLE_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
)
"""What PyTorch raises for damaged or forbidden pickles."""

Shapes = Mapping[str, tuple[int, ...]]


def read_json_object(file: Path) -> dict[str, Any]:
    """Read a JSON file that holds one object.

    Raises:
        FileNotFoundError: If there is no such regular file.
        ValueError: If it is too large, not JSON, or not an object.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: give a complete folder")
    if file.stat().st_size > JSON_LIMIT:
        raise ValueError(f"{file} has {file.stat().st_size} bytes, more than the limit of {JSON_LIMIT}")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON ({error}): copy it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} must hold a JSON object, not {type(value).__name__}: copy it again")
    return value


def weight_shapes(folder: Path, stem: str = "model", variant: str | None = None) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all weights in a folder, from the headers of its safetensors files.

    They are named after `stem`: `model` for Transformers, `diffusion_pytorch_model` for diffusers. As in diffusers,
    `variant` is `fp16` for `STEM.fp16.safetensors`. There may be an index and its shards instead of a single file.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged, or an index names files outside of the folder.
    """
    infix = f".{variant}" if variant else ""
    single = folder / f"{stem}{infix}.safetensors"
    index = folder / f"{stem}.safetensors.index{infix}.json"
    if single.is_file() or not index.is_file():
        return file_shapes(single)
    shapes: dict[str, tuple[int, ...]] = {}
    for name in shard_names(index):
        shapes |= file_shapes(folder / name)
    return shapes


def file_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights in one safetensors file, from its header.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: weights are read from safetensors files only")
    try:
        with safe_open(file, framework="pt") as weights:
            return {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}): copy it again") from error


def load_pickled_tensors(file: Path) -> dict[str, torch.Tensor]:
    """Read a dictionary of tensors that `torch.save` wrote, without running code from it or using more memory.

    Raises:
        ValueError: If the file is damaged, compressed, or holds anything else.
    """
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                if any(member.file_size > member.compress_size for member in archive.infolist()):
                    raise ValueError("it is compressed, which torch.save never does")
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except _PICKLE_ERRORS as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{file} cannot be read as plain tensors and is refused, because loading other objects can run code "
            f"({reason}): convert it to safetensors on a machine where you trust it"
        ) from error
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in tensors.items()
    ):
        raise ValueError(f"{file} is not a dictionary of tensors: give a state dict written by torch.save")
    for name, value in tensors.items():
        # A few bytes can describe a tensor of any size: expanded, sparse, or without values.
        if value.layout != torch.strided or value.is_meta or value.nbytes > value.untyped_storage().nbytes():
            raise ValueError(f"{file}: {name} of shape {list(value.shape)} is larger than its data in the file")
    return tensors


def check_weights(found: Shapes, expected: Shapes, where: object) -> None:
    """Check that the weights found in `where` are exactly those of the model's configuration.

    Raises:
        ValueError: With the number of weights that are missing, unexpected or of another shape, and the first of them.
    """
    missing, unexpected = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    differing = [name for name in sorted(expected.keys() & found.keys()) if found[name] != expected[name]]
    if missing:
        raise ValueError(f"{where} lacks {len(missing)} weights of its configuration, for example {missing[0]}")
    if unexpected:
        raise ValueError(f"{where} holds {len(unexpected)} weights unknown to its configuration: {unexpected[0]}")
    if differing:
        name = differing[0]
        raise ValueError(
            f"{where}: {name} has shape {list(found[name])}, but its configuration asks for {list(expected[name])} "
            f"({len(differing)} such weights)"
        )


def check_layer_counts(config: Mapping[str, Any], limit: int, where: object) -> None:
    """Check that a configuration does not ask for more layers than `limit`, before a model of that size is built.

    Fields named `…layers…` and lists named `…block…` count. A layer has at least one weight, so the number of weights
    in the files is a limit.

    Raises:
        ValueError: With the field that asks for too many.
    """
    in_a_block = 1
    for name, value in _fields(config):
        if "layers" in name:
            count = max((abs(number) for number in _integers(value)), default=0)
        elif "block" in name and isinstance(value, list):
            count = len(value)
        else:
            continue
        if name.endswith("layers_per_block"):
            count = in_a_block = in_a_block * max(count, 1)  # layers of a block times layers of each transformer in it
        if count > limit:
            raise ValueError(
                f"{where}: {name} asks for {count} layers or blocks, but at most {limit} are possible here"
            )


def check_implementations(config: Mapping[str, Any], where: object) -> None:
    """Raise a `ValueError` if a configuration names kernels on the Hub, whose code Transformers would run."""
    for name, value in _fields(config):
        if name.endswith("_implementation") and "/" in str(value):
            raise ValueError(
                f"{where}: {name} {value!r} is code on the Hub, which is never run: remove it, or choose sdpa or "
                "flash_attention_2"
            )


def check_finite(weights: Iterable[tuple[str, torch.Tensor]], where: object) -> None:
    """Raise a `ValueError` that names the first weight with NaN, infinite or no values."""
    for name, value in weights:
        if value.is_meta:
            raise ValueError(f"{where}: {name} has no values: the weight is missing in the files")
        if value.is_floating_point() and value.numel():
            lowest, highest = torch.aminmax(value.detach())  # NaN if any value is; unlike isfinite(), makes no copy
            if not (math.isfinite(lowest.item()) and math.isfinite(highest.item())):
                raise ValueError(f"{where}: {name} holds NaN or infinite values: copy the file again or use another")


def shard_names(index: Path) -> list[str]:
    """The files that the index of sharded weights names, sorted.

    Raises:
        FileNotFoundError: If there is no such index.
        ValueError: If it is damaged, or names files outside of its folder.
    """
    names = read_json_object(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{index} has no weight_map from weights to files: copy it again")
    for name in names.values():
        if Path(name).name != name:
            raise ValueError(f"{index} names {name!r}, which is not a file in its own folder: copy it again")
    return sorted(set(names.values()))


def _fields(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, list):
        for each in value:
            yield from _fields(each)
    elif isinstance(value, Mapping):
        for name, each in value.items():
            yield str(name), each
            yield from _fields(each)


def _integers(value: Any) -> Iterator[int]:
    if isinstance(value, list):
        for each in value:
            yield from _integers(each)
    elif isinstance(value, int):
        yield value
