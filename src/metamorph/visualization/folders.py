"""What visualizer and Stable Diffusion folders may hold, checked before anything in them is imported or built.

Such a folder is data: of its files only JSON and safetensors are read, and only the classes named here are built.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import diffusers
import torch
from diffusers import AutoencoderKL, SchedulerMixin, UNet2DConditionModel
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError

from metamorph.files.model_files import (
    check_finite,
    check_implementations,
    check_layer_counts,
    check_weights,
    read_json_object,
    weight_shapes,
)
from metamorph.visualization.encoder import VisualTokenEncoder
from metamorph.visualization.projector import VisualizationProjector


ARGUMENTS_FILE = "visualizer_arguments.json"
"""Beside the pipeline: the flags it was trained with, among them those of the vision tower."""
INDEX_FILE = "model_index.json"
WEIGHTS_STEM = "diffusion_pytorch_model"
PIPELINE_CLASS = "VisualizationPipeline"
MODELS: dict[str, tuple[str, type[ModelMixin]]] = {
    "projector": ("metamorph.visualization.projector", VisualizationProjector),
    "unet": ("diffusers", UNet2DConditionModel),
    "vae": ("diffusers", AutoencoderKL),
    "vision_tower": ("metamorph.visualization.encoder", VisualTokenEncoder),
}
"""The models of a visualizer: component -> library and class. A vision tower may be missing."""
SCHEDULERS = frozenset(scheduler.name for scheduler in KarrasDiffusionSchedulers)
"""The samplers of diffusers that can stand in for each other."""
MAX_SCHEDULER_NUMBER = 100_000
"""Limit of every integer of a scheduler's configuration; Stable Diffusion has 1000 time steps."""
LIMITS: dict[type[ModelMixin], tuple[str, int]] = {
    UNet2DConditionModel: ("sample_size", 512),
    VisualTokenEncoder: ("num_image_tokens", 128**2),
}
"""Sizes that no weight depends on: latents along a side of a picture, and visual tokens per picture."""
MAX_NEW_LAYERS = 256
MAX_NEW_PARAMETERS = 5_000_000_000
"""Of a model that is built without weight files: twice as many parameters as the UNet of Stable Diffusion XL has."""

_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token")
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Layers of the attention of a VAE in the folders of early Stable Diffusion -> their present names."""
_BUILD_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)
"""What constructors of diffusers and Transformers raise for values that nobody has thought of."""

Model = TypeVar("Model", bound=ModelMixin)


def local_folder(name: str | Path, components: tuple[str, ...], variant: str | None = None, **options: Any) -> Path:
    """A local folder as it is; of a Hub id, the files that are read, and no others, are downloaded.

    Args:
        name: Folder or Hub id.
        components: Subfolders that are needed.
        variant: As in diffusers.
        **options: Of `from_pretrained`; those of the Hub (`cache_dir`, `revision`, `token`, …) count.

    Raises:
        OSError: if the Hub has no such repository, or cannot be reached.
    """
    folder = Path(name).expanduser()
    if folder.exists():
        return folder
    infix = f".{variant}" if variant else ""
    weights = (f"{WEIGHTS_STEM}{infix}.safetensors", f"{WEIGHTS_STEM}{infix}-*.safetensors")
    patterns = [f"{component}/{file}" for component in components for file in ("*.json", *weights)]
    hub = {option: options[option] for option in _HUB_OPTIONS if option in options}
    return Path(snapshot_download(str(name), allow_patterns=[INDEX_FILE, ARGUMENTS_FILE, *patterns], **hub))


def visualizer_folder(name: str | Path, variant: str | None = None, **options: Any) -> Path:
    """As `local_folder`, with all components of a visualizer."""
    return local_folder(name, (*MODELS, "scheduler"), variant, **options)


def check_visualizer(folder: Path, given: frozenset[str] = frozenset(), variant: str | None = None) -> None:
    """Check everything that a visualizer folder says about itself against what a visualizer is made of.

    Args:
        folder: Local folder.
        given: Components that come from elsewhere: they are not read.
        variant: As in diffusers.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: naming the file, and the component, class, field or weight that is not as it must be.
    """
    file = folder / INDEX_FILE
    index = read_json_object(file)
    if index.get("_class_name") != PIPELINE_CLASS:
        raise ValueError(
            f"{file} describes {index.get('_class_name')!r}, not a {PIPELINE_CLASS}: give a folder written by "
            "`metamorph train-visualizer`"
        )
    for component, value in index.items():
        if not component.startswith("_") and value not in _allowed(component):
            raise ValueError(f"{file}: {component} must not be {value!r}; {_hint(component)}")
    required = {*MODELS, "scheduler"} - {"vision_tower"} - given
    if missing := sorted(required - index.keys()):
        raise ValueError(f"{file} lacks {', '.join(missing)}: give a folder written by `metamorph train-visualizer`")
    for component, (_, kind) in MODELS.items():
        if component not in given and index.get(component, [None])[0] is not None:
            check_model(kind, folder / component, variant)
    if "scheduler" not in given:
        check_scheduler(getattr(diffusers, index["scheduler"][1]), folder / "scheduler")


def check_model(kind: type[ModelMixin], folder: Path, variant: str | None = None) -> None:
    """Compare the configuration of a component with the headers of its weights, before any memory is taken.

    Args:
        kind: Class of the component.
        folder: Its subfolder, with `config.json` and `diffusion_pytorch_model.safetensors`.
        variant: As in diffusers.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if they do not belong together, or the configuration asks for what is not supported.
    """
    file = folder / "config.json"
    config = read_model_config(kind, folder)
    _check_one_kind_of_weights(folder, variant)
    found = weight_shapes(folder, WEIGHTS_STEM, variant)
    check_layer_counts(config, len(found), file)
    model = _build(kind, config, file, "meta")
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    check_weights({_present_name(name, expected): shape for name, shape in found.items()}, expected, folder)


def read_model_config(kind: type[ModelMixin], folder: Path) -> dict[str, Any]:
    """The JSON of a component's configuration; its sizes that no weight depends on have limits.

    Args:
        kind: Class of the component.
        folder: Its subfolder, with `config.json`.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if it is damaged, or asks for what is not supported.
    """
    file = folder / "config.json"
    config = read_json_object(file)
    if config.get("quantization_config") is not None:
        raise ValueError(f"{file} has a quantization_config: give a folder whose weights are not quantised")
    check_implementations(config, file)
    if kind in LIMITS:
        _check_size(config, *LIMITS[kind], file)
    return config


def build_model(kind: type[Model], folder: Path) -> Model:
    """Build a component with random weights from its configuration alone.

    Args:
        kind: Class of the component.
        folder: Its subfolder, with `config.json`.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if it is not the configuration of a `kind`, or of one with more layers or parameters than
            `MAX_NEW_LAYERS` and `MAX_NEW_PARAMETERS`.
    """
    file = folder / "config.json"
    config = read_model_config(kind, folder)
    check_layer_counts(config, MAX_NEW_LAYERS, file)
    parameters = sum(value.numel() for value in _build(kind, config, file, "meta").parameters())
    if parameters > MAX_NEW_PARAMETERS:
        raise ValueError(f"{file} asks for {parameters} parameters, more than {MAX_NEW_PARAMETERS}")
    return _build(kind, config, file, "cpu")


def check_scheduler(kind: type[SchedulerMixin], folder: Path) -> None:
    """Build a scheduler once its numbers are known to be small.

    Args:
        kind: Class of the scheduler.
        folder: With `scheduler_config.json`.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if it does not fit `kind`, or a number is too large.
    """
    file = folder / "scheduler_config.json"
    config = read_json_object(file)
    for name, value in config.items():
        if isinstance(value, int) and abs(value) > MAX_SCHEDULER_NUMBER:
            raise ValueError(f"{file}: {name} {value} is larger than {MAX_SCHEDULER_NUMBER}, which no sampler needs")
    try:
        kind.from_config(config)
    except (*_BUILD_ERRORS, ImportError) as error:
        raise ValueError(f"{file} is not the configuration of a {kind.__name__}: {_reason(error)}") from error


def load_model(kind: type[Model], folder: Path, variant: str | None = None, **options: Any) -> Model:
    """Load a component from its subfolder: checked, from safetensors files only, and finite.

    Args:
        kind: Class of the component.
        folder: Local subfolder.
        variant: As in diffusers.
        **options: Of `from_pretrained`, such as `torch_dtype`.

    Raises:
        FileNotFoundError: as `check_model`.
        ValueError: as `check_model`, or if a weight is not finite.
    """
    check_model(kind, folder, variant)
    model = kind.from_pretrained(folder, variant=variant, use_safetensors=True, **options)
    check_finite(model.state_dict().items(), folder)
    return model


def _build(kind: type[Model], config: dict[str, Any], file: Path, device: str) -> Model:
    try:
        with torch.device(device):
            return kind.from_config(config)
    except _BUILD_ERRORS as error:
        raise ValueError(f"{file} is not the configuration of a {kind.__name__}: {_reason(error)}") from error


def _allowed(component: str) -> list[list[str | None]]:
    """The pairs of library and class that the index may name for a component."""
    if component == "scheduler":
        return [["diffusers", name] for name in SCHEDULERS]
    if component not in MODELS:
        return []
    library, kind = MODELS[component]
    pairs: list[list[str | None]] = [[library, kind.__name__]]
    return [*pairs, [None, None]] if component == "vision_tower" else pairs


def _hint(component: str) -> str:
    if component == "scheduler":
        return f"it must be one of diffusers' {', '.join(sorted(SCHEDULERS))}"
    if component in MODELS:
        library, kind = MODELS[component]
        return f"it must be {kind.__name__} of {library}: code that a folder names or brings along is never run"
    return f"a visualizer consists of {', '.join((*MODELS, 'scheduler'))} only"


def _check_one_kind_of_weights(folder: Path, variant: str | None) -> None:
    """Diffusers would read an index rather than the single file that `weight_shapes` reads, also one of an old name."""
    infix = f".{variant}" if variant else ""
    names = (f"{infix}.safetensors", f".safetensors.index{infix}.json", f".safetensors{infix}.index.json")
    files = [file for name in dict.fromkeys(names) if (file := folder / f"{WEIGHTS_STEM}{name}").is_file()]
    if len(files) > 1:
        raise ValueError(f"{folder} holds weights twice, {files[0].name} and {files[1].name}: remove one of them")


def _check_size(config: dict[str, Any], name: str, limit: int, file: Path) -> None:
    value = config.get(name)
    for size in value if isinstance(value, list) else [value]:
        if size is not None and not (isinstance(size, int) and 0 < size <= limit):
            raise ValueError(f"{file}: {name} {value!r} must be a whole number of 1 to {limit}")


def _present_name(name: str, expected: dict[str, tuple[int, ...]]) -> str:
    if name in expected:
        return name
    path, _, parameter = name.rpartition(".")
    parent, _, layer = path.rpartition(".")
    present = f"{parent}.{_OLD_NAMES.get(layer, layer)}.{parameter}"
    return present if present in expected else name


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
