"""Specs: YAML files that say what a benchmark asks, how the model answers, and how answers are judged."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metamorph.data.tasks.base import check_count, check_positive, fill
from metamorph.evaluation.loaders import LOADERS
from metamorph.evaluation.loaders.base import Loader
from metamorph.evaluation.metrics import METRICS
from metamorph.evaluation.metrics.base import Metric
from metamorph.evaluation.options import build, read_options
from metamorph.evaluation.samples import Sample
from metamorph.files.yaml_files import read_yaml
from metamorph.flags.parser import nearest
from metamorph.inference.batch_lines import BatchDefaults
from metamorph.inference.draw import SamplerSettings
from metamorph.inference.sampling import Sampling


FOLDER = Path(__file__).parents[1] / "specs"
"""The specs that ship with the package."""
_PLACEHOLDER = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Decoding:
    """How the model answers and the visualizer draws; the flags of `metamorph generate` of the same names."""

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    draw: bool = False
    guidance_scale: float = 3.0
    steps: int = 20
    num_images: int = 1
    fps: float = 1.0
    max_frames: int = 8

    def __post_init__(self) -> None:
        Sampling(self.temperature, self.top_p, self.top_k)  # which checks them
        if not self.temperature and (self.top_p, self.top_k) != (1.0, 0):
            raise ValueError("top_p and top_k have no effect without a temperature: the answer is greedy")
        for name in ("max_new_tokens", "steps", "num_images", "max_frames"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        check_positive("fps", self.fps)
        if self.guidance_scale < 0:
            raise ValueError(f"guidance_scale must not be negative: {self.guidance_scale:g}")

    def defaults(self, seed: int, dtype: str) -> BatchDefaults:
        """The same for a file of prompts."""
        return BatchDefaults(
            self.draw,
            Sampling(self.temperature, self.top_p, self.top_k, seed),
            SamplerSettings(self.guidance_scale, self.steps, seed, num_images=self.num_images),
            self.max_new_tokens,
            self.fps,
            self.max_frames,
            dtype,
        )


@dataclass(frozen=True)
class _Keys:
    """The keys of a spec's file."""

    data: dict[str, Any]
    prompt: str
    metric: dict[str, Any]
    decoding: dict[str, Any] | None = None
    seed: int = 0
    description: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        check_count("seed", self.seed, least=0)
        if not self.prompt.strip():
            raise ValueError("prompt is empty: say what to ask, with fields of the samples in braces")


@dataclass(frozen=True)
class Spec:
    """A benchmark: its data, prompt and metric, and how the model answers."""

    name: str
    """That of its file."""
    content: Mapping[str, Any]
    """Its file."""
    loader: Loader
    prompt: str
    """With names of the samples' fields in braces."""
    metric: Metric
    decoding: Decoding
    seed: int
    path: Path | None = None
    """The data; None if the spec does not say where they are."""

    @property
    def sha256(self) -> str:
        """Identifies the content, not how it is laid out in the file."""
        return hashlib.sha256(json.dumps(self.content, sort_keys=True).encode()).hexdigest()

    @property
    def draws(self) -> bool:
        """Whether answers have images that count."""
        return self.metric.needs_images or self.metric.needs_visual_tokens or self.decoding.draw

    def load(self, path: Path | None = None) -> Sequence[Sample]:
        """The samples in `path`, by default where the spec says; checks that the prompt fits them.

        Raises:
            FileNotFoundError: If there is no such file or folder.
            ValueError: If the layout is wrong, or the data do not fit the prompt or the metric.
        """
        path = path or self.path
        if path is None:
            source = self.content.get("source")
            raise FileNotFoundError(f"{self.name} needs --data-path" + (f", its data from {source}" if source else ""))
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist: give the data of {self.name} as --data-path")
        samples = self.loader.load(path)
        if not samples:
            raise ValueError(f"{path} has no samples")
        taken: set[str] = set()
        names = _PLACEHOLDER.findall(self.prompt)
        for sample in samples:
            if sample.id in taken:
                raise ValueError(f"{path}: two samples have the id {sample.id!r}")
            taken.add(sample.id)
            for name in names:
                if name not in sample.fields:
                    near = nearest(name, sample.fields)
                    hint = f": did you mean {{{near}}}?" if near else ""
                    has = ", ".join(sample.fields)
                    raise ValueError(
                        f"the prompt of {self.name} names {{{name}}}, but sample {sample.id} of {path} has {has}{hint}"
                    )
        return samples

    def choose(self, path: Path | None = None, limit: int | None = None) -> list[tuple[int, Sample]]:
        """Load the samples in `path`, or about `limit` of them, with their numbers; the metric has checked them."""
        samples = self.load(path)
        chosen = list(enumerate(samples)) if limit is None else some_of(samples, self.metric, limit)
        self.metric.check([sample for _, sample in chosen])
        return chosen

    def prompt_of(self, sample: Sample) -> str:
        """The prompt for a sample."""
        return fill(self.prompt, **sample.fields).strip()


@dataclass(frozen=True)
class SpecChoice:
    """A benchmark, its data, and how many samples of it are used."""

    spec: Spec
    path: Path | None = None
    """By default that of the spec."""
    limit: int | None = None

    @classmethod
    def parse(cls, text: str) -> SpecChoice:
        """Read `SPEC`, `SPEC=DATA`, `SPEC:LIMIT` or `SPEC=DATA:LIMIT`; errors as those of `read_spec`."""
        rest, colon, number = text.rpartition(":")
        has_limit = bool(colon) and number.isdecimal()
        if has_limit and not int(number):
            raise ValueError(f"{text!r} asks for no samples: give a limit of at least 1, or leave it out")
        reference, _, path = (rest if has_limit else text).partition("=")
        spec = read_spec(reference)
        if not path and spec.path is None:
            raise ValueError(f"{spec.name} needs its data: write {reference}=DATA")
        if path and not Path(path).expanduser().exists():
            raise FileNotFoundError(f"{path} does not exist: write {reference}=DATA with the data of {spec.name}")
        return cls(spec, Path(path).expanduser() if path else None, int(number) if has_limit else None)

    def load(self) -> list[tuple[int, Sample]]:
        """See `Spec.choose`."""
        return self.spec.choose(self.path, self.limit)


def shipped_specs() -> dict[str, dict[str, Any]]:
    """The content of each spec that ships with the package, by name."""
    return {file.stem: read_yaml(file) for file in _shipped()}


def _shipped() -> list[Path]:
    return sorted(FOLDER.glob("*.yaml"), key=lambda file: file.stem)


def find_spec(reference: str, commands: Sequence[str] = ()) -> Path:
    """The file of that path or, if there is none, the shipped spec of that name.

    If it is neither, raises a `FileNotFoundError` that names a similar spec, or one of the `commands` that share the
    place of its name.
    """
    file = Path(reference).expanduser()
    if file.is_file():
        return file
    names = [shipped.stem for shipped in _shipped()]
    if reference in names:
        return FOLDER / f"{reference}.yaml"
    near = nearest(file.name.removesuffix(".yaml"), [*names, *commands])
    hint = f"did you mean {near!r}? Give" if near else "give"
    raise FileNotFoundError(
        f"{reference} is neither a file nor the name of a benchmark: {hint} a YAML file or one of "
        f"{', '.join([*names, *commands])}"
    )


def read_spec(reference: str, commands: Sequence[str] = ()) -> Spec:
    """Read the spec that `find_spec` finds.

    Raises:
        ValueError: If a key is unknown, missing or of another type; it names the file and the key.
    """
    file = find_spec(reference, commands)
    try:
        content = read_yaml(file)
    except ValueError as error:
        raise ValueError(f"{file} cannot be read as a spec: {error}") from error
    keys = read_options(_Keys, content, str(file))
    if "loader" not in keys.data:
        raise ValueError(f"{file}: data needs the key 'loader', which is one of {', '.join(LOADERS)}")
    options = {"name" if key == "loader" else key: value for key, value in keys.data.items() if key != "path"}
    path = keys.data.get("path")
    if not isinstance(path, (str, type(None))):
        raise ValueError(f"{file}: path of data must be text, not {path!r:.80}")
    return Spec(
        name=file.stem,
        content=content,
        loader=build(LOADERS, options, f"{file}: data"),
        prompt=keys.prompt,
        metric=build(METRICS, keys.metric, f"{file}: metric"),
        decoding=read_options(Decoding, keys.decoding or {}, f"{file}: decoding"),
        seed=keys.seed,
        path=None if path is None else file.parent / Path(path).expanduser(),
    )


def some_of(samples: Sequence[Sample], metric: Metric, limit: int) -> list[tuple[int, Sample]]:
    """About `limit` samples with their numbers, evenly spaced in the order of the file; units stay together."""
    units: dict[str, list[tuple[int, Sample]]] = {}
    for number, sample in enumerate(samples):
        units.setdefault(metric.unit(sample), []).append((number, sample))
    count = min(max(limit * len(units) // len(samples), 1), len(units))
    chosen = [list(units.values())[index * len(units) // count] for index in range(count)]
    return sorted(pair for unit in chosen for pair in unit)
