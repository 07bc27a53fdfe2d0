"""Mixtures: a YAML list of sources, each with its task and its share of an epoch."""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from dataclasses import fields as fields_of
from pathlib import Path
from typing import Any

import numpy as np

from metamorph.data.fields import FieldMap, unknown_key
from metamorph.data.records import DataError
from metamorph.data.sources.open import ALLOWED, expand_pattern, is_tar_pattern
from metamorph.data.tasks import get_task, parse_options
from metamorph.data.tasks.base import check_count
from metamorph.files.yaml_files import read_yaml


MAX_WEIGHT = 1000
MAX_SAMPLES = 2**31
"""Maximum number of samples of a source in an epoch: their numbers alone take 16 GiB."""


@dataclass(frozen=True)
class SourceSpec:
    """One entry of a mixture."""

    path: str
    """A JSON or JSONL file, or a pattern of tars; relative paths start at the folder of the mixture."""
    image_folder: str | None = None
    """Folder of the media; by default `--image_folder`, else the folder of the file. Tars bring their own."""
    task: str = "instruction"
    """How records become conversations."""
    weight: float = 1.0
    """How often an epoch has each record: 2 is twice; 0.5 is every second one, picked by the seed."""
    max_samples: int | None = None
    """Instead of `weight`: at most this many records, picked by the seed."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the task."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Names of our fields in the records, see [Other layouts](#other-layouts)."""
    name: str = ""
    """Name in logs and reports; by default that of the file, without suffix."""

    def __post_init__(self) -> None:
        for name in ("path", "image_folder", "task", "name"):
            value = getattr(self, name)
            if not isinstance(value, str) and not (name == "image_folder" and value is None):
                raise ValueError(f"{name} must be text, not {value!r}")
        if not self.path:
            raise ValueError("path is required: the file of the records")
        for name in ("options", "fields"):
            if not isinstance(getattr(self, name), Mapping):
                raise ValueError(f"{name} must be a mapping of names to values, not {getattr(self, name)!r}")
        is_number = isinstance(self.weight, (int, float)) and not isinstance(self.weight, bool)
        if not is_number or not 0 < self.weight <= MAX_WEIGHT:
            raise ValueError(f"weight must be a number above 0 and at most {MAX_WEIGHT}, not {self.weight!r}")
        if self.max_samples is not None:
            check_count("max_samples", self.max_samples)
            if self.weight != 1:
                fault = f"weight {self.weight} and max_samples {self.max_samples} exclude each other; keep one"
                raise ValueError(fault)
        if not self.name:
            object.__setattr__(self, "name", Path(self.path).stem)
        parse_options(get_task(self.task), self.options)
        FieldMap(self.fields)

    def choose(self, num_records: int, seed: int) -> np.ndarray | None:
        """Which of the records an epoch has.

        Returns:
            int64 `[samples]` record numbers, or None for every record once.

        Raises:
            DataError: If there are more than `MAX_SAMPLES`.
        """
        wanted = round(self.weight * num_records) if self.max_samples is None else min(self.max_samples, num_records)
        wanted = max(wanted, 1)
        if wanted == num_records:
            return None
        if wanted > MAX_SAMPLES:
            raise DataError(
                f"source {self.name}: weight {self.weight:g} makes {wanted} samples of {num_records} records; lower it"
            )
        copies, rest = divmod(wanted, num_records)
        rng = np.random.default_rng([seed, zlib.crc32(self.name.encode(errors="surrogatepass"))])
        chosen = np.sort(rng.choice(num_records, size=rest, replace=False)).astype(np.int64)
        return np.concatenate([np.tile(np.arange(num_records), copies), chosen])


def read_specs(path: str | os.PathLike[str]) -> list[SourceSpec]:
    """The sources that `--data_path` names: those of a mixture, or a single one. Their files must exist.

    Raises:
        FileNotFoundError: If there is no such file.
        DataError: If a mixture is not valid; the message names the file and the entry.
    """
    path = os.path.expanduser(os.fspath(path))
    if not path.lower().endswith((".yaml", ".yml")):
        _check_path(path, f"--data_path {path}")
        return [SourceSpec(path)]
    if not os.path.isfile(path):
        raise FileNotFoundError(f"--data_path {path} does not exist: give {ALLOWED}")
    try:
        entries = read_yaml(Path(path))
    except ValueError as error:
        raise DataError(f"{path} cannot be read as a mixture: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{path} must be a list of sources, each with path: and task:, not {entries!r:.80}")
    specs: list[SourceSpec] = []
    for number, entry in enumerate(entries, 1):
        try:
            spec = _parse_entry(entry, Path(path).parent, {spec.name for spec in specs})
            _check_path(spec.path, f"path {spec.path}")
            if spec.image_folder is not None and not os.path.isdir(spec.image_folder):
                raise FileNotFoundError(f"image_folder {spec.image_folder} does not exist or is not a folder")
        except (ValueError, TypeError, FileNotFoundError) as error:
            raise DataError(f"{path}, source {number}: {error}") from error
        specs.append(spec)
    return specs


def _check_path(path: str, named: str) -> None:
    if is_tar_pattern(path):
        expand_pattern(path)
    elif not os.path.isfile(path):
        raise FileNotFoundError(f"{named} does not exist or is not a file: give {ALLOWED}")


def _parse_entry(entry: Any, folder: Path, taken: set[str]) -> SourceSpec:
    if not isinstance(entry, Mapping):
        raise ValueError(f"a source must be a mapping with path: and task:, not {entry!r:.80}")
    known = [item.name for item in fields_of(SourceSpec)]
    for key in entry:
        if key not in known:
            raise ValueError(unknown_key(key, known))
    if "path" not in entry:
        raise ValueError("path is required: the file of the records")
    values = {key: value for key, value in entry.items() if value is not None}
    for key in ("path", "image_folder"):
        if isinstance(values.get(key), str):
            values[key] = str(folder / os.path.expanduser(values[key]))
    spec = SourceSpec(**values)
    if spec.name not in taken:
        return spec
    if "name" in values:
        raise ValueError(f"name {spec.name!r} is taken by another source; choose another")
    number = next(number for number in range(2, len(taken) + 2) if f"{spec.name}-{number}" not in taken)
    return SourceSpec(**values, name=f"{spec.name}-{number}")
