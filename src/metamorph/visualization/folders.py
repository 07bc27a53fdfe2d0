"""Contents of visualizer and Stable Diffusion folders, checked before anything in them is imported or built.

Such a folder is data: only its JSON and safetensors files are read, and only the classes named here are built. All
checks raise a `FileNotFoundError` for a missing file, and else a `ValueError` that names the file and what is wrong.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import diffusers
import torch
from diffusers import AutoencoderKL, SchedulerMixin, UNet2DConditionModel
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from huggingface_hub import snapshot_download

from metamorph.files.model_files import (
    BUILD_ERRORS,
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
"""Next to the pipeline: the flags it was trained with, including those of the vision tower."""
INDEX_FILE = "model_index.json"
WEIGHTS_STEM = "diffusion_pytorch_model"
PIPELINE_CLASS = "VisualizationPipeline"
MODELS: dict[str, tuple[str, type[ModelMixin]]] = {
    "projector": ("metamorph.visualization.projector", VisualizationProjector),
    "unet": ("diffusers", UNet2DConditionModel),
    "vae": ("diffusers", AutoencoderKL),
    "vision_tower": ("metamorph.visualization.encoder", VisualTokenEncoder),
}
"""The models of a visualizer: component → library and class. The vision tower is optional."""
SCHEDULERS = frozenset(scheduler.name for scheduler in KarrasDiffusionSchedulers)
"""The samplers of diffusers that can replace each other."""
MAX_SCHEDULER_NUMBER = 100_000
"""Limit of every integer of a scheduler's configuration; Stable Diffusion has 1000 time steps."""
LIMITS: dict[type[ModelMixin], tuple[str, int]] = {
    UNet2DConditionModel: ("sample_size", 512),
    VisualTokenEncoder: ("num_image_tokens", 128**2),
}
"""Sizes that no weight depends on: latents along a side of an image, and visual tokens per image."""
MAX_NEW_LAYERS = 256
MAX_NEW_PARAMETERS = 5_000_000_000
"""Limit for a model that is built without weight files: twice the size of the UNet of Stable Diffusion XL."""

_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token")
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Attention layers of a VAE in the folders of early Stable Diffusion → their present names."""

Model = TypeVar("Model", bound=ModelMixin)


def local_folder(
    name: str | Path, components: Sequence[str] = (*MODELS, "scheduler"), variant: str | None = None, **options: Any
) -> Path:
    """Return an existing folder, or download the JSON and safetensors files of these components of a Hub id.

    Of the `options` of `from_pretrained`, those of the Hub (`cache_dir`, `revision`, `token`, …) count.
    """
    folder = Path(name).expanduser()
    if folder.exists():
        return folder
    infix = f".{variant}" if variant else ""
    weights = (f"{WEIGHTS_STEM}{infix}.safetensors", f"{WEIGHTS_STEM}{infix}-*.safetensors")
    patterns = [f"{component}/{file}" for component in components for file in ("*.json", *weights)]
    hub = {option: options[option] for option in _HUB_OPTIONS if option in options}
    return Path(snapshot_download(str(name), allow_patterns=[INDEX_FILE, ARGUMENTS_FILE, *patterns], **hub))


def check_visualizer(folder: Path, given: frozenset[str] = frozenset(), variant: str | None = None) -> None:
    """Check that a folder describes a visualizer: its index, and all components but those `given` from elsewhere."""
    file = folder / INDEX_FILE
    index = read_json_object(file)
    if index.get("_class_name") != PIPELINE_CLASS:
        raise ValueError(
            f"{file} describes {index.get('_class_name')!r}, not a {PIPELINE_CLASS}: give a folder written by "
            "`metamorph train-visualizer`"
        )
    for component, value in index.items():
        if not component.startswith("_"):
            _check_component(component, value, file)
    required = {*MODELS, "scheduler"} - {"vision_tower"} - given
    if missing := sorted(required - index.keys()):
        raise ValueError(f"{file} lacks {', '.join(missing)}: give a folder written by `metamorph train-visualizer`")
    for component, (_, kind) in MODELS.items():
        if component not in given and index.get(component, [None])[0] is not None:
            check_model(kind, folder / component, variant)
    if "scheduler" not in given:
        check_scheduler(getattr(diffusers, index["scheduler"][1]), folder / "scheduler")


def check_model(kind: type[ModelMixin], folder: Path, variant: str | None = None) -> None:
    """Compare the configuration of a component with the headers of its weights, before any memory is allocated."""
    file = folder / "config.json"
    config = read_model_config(kind, folder)
    _check_one_kind_of_weights(folder, variant)
    found = weight_shapes(folder, WEIGHTS_STEM, variant)
    check_layer_counts(config, len(found), file)
    model = _build(kind, config, file, "meta")
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    check_weights({_present_name(name, expected): shape for name, shape in found.items()}, expected, folder)


def read_model_config(kind: type[ModelMixin], folder: Path) -> dict[str, Any]:
    """Read a component's `config.json`; sizes that no weight depends on have limits."""
    file = folder / "config.json"
    config = read_json_object(file)
    if config.get("quantization_config") is not None:
        raise ValueError(f"{file} has a quantization_config: give a folder whose weights are not quantised")
    check_implementations(config, file)
    if kind in LIMITS:
        name, limit = LIMITS[kind]
        value = config.get(name)
        for size in value if isinstance(value, list) else [value]:
            if size is not None and not (isinstance(size, int) and 0 < size <= limit):
                raise ValueError(f"{file}: {name} {value!r} must be an integer from 1 to {limit}")
    return config


def build_model(kind: type[Model], folder: Path) -> Model:
    """Build a component with random weights from its configuration alone; its size is limited."""
    file = folder / "config.json"
    config = read_model_config(kind, folder)
    check_layer_counts(config, MAX_NEW_LAYERS, file)
    parameters = sum(value.numel() for value in _build(kind, config, file, "meta").parameters())
    if parameters > MAX_NEW_PARAMETERS:
        raise ValueError(f"{file} asks for {parameters} parameters, more than {MAX_NEW_PARAMETERS}")
    return _build(kind, config, file, "cpu")


def check_scheduler(kind: type[SchedulerMixin], folder: Path) -> None:
    """Check that `scheduler_config.json` has no large numbers and that a scheduler can be built from it."""
    file = folder / "scheduler_config.json"
    config = read_json_object(file)
    for name, value in config.items():
        if isinstance(value, int) and abs(value) > MAX_SCHEDULER_NUMBER:
            raise ValueError(f"{file}: {name} {value} is larger than {MAX_SCHEDULER_NUMBER}, which no sampler needs")
    _build(kind, config, file, "cpu")


def load_model(kind: type[Model], folder: Path, variant: str | None = None, **options: Any) -> Model:
    """Check a component and load it from safetensors files; `options` are those of `from_pretrained`."""
    check_model(kind, folder, variant)
    model = kind.from_pretrained(folder, variant=variant, use_safetensors=True, **options)
    check_finite(model.state_dict().items(), folder)
    return model


def _build(kind: Any, config: dict[str, Any], file: Path, device: str) -> Any:
    try:
        with torch.device(device):
            return kind.from_config(config)
    except (*BUILD_ERRORS, ImportError) as error:  # the latter: a sampler may need SciPy
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{file} is not the configuration of a {kind.__name__}: {reason}") from error


def _check_component(component: str, value: Any, file: Path) -> None:
    """Check the library and class that the index names for a component."""
    allowed: list[list[str | None]] = []
    hint = f"a visualizer consists of {', '.join((*MODELS, 'scheduler'))} only"
    if component == "scheduler":
        allowed = [["diffusers", name] for name in SCHEDULERS]
        hint = f"it must be one of diffusers' {', '.join(sorted(SCHEDULERS))}"
    elif component in MODELS:
        library, kind = MODELS[component]
        allowed = [[library, kind.__name__]]
        if component == "vision_tower":
            allowed.append([None, None])
        hint = f"it must be {kind.__name__} of {library}: code that a folder names or brings along is never run"
    if value not in allowed:
        raise ValueError(f"{file}: {component} must not be {value!r}; {hint}")


def _check_one_kind_of_weights(folder: Path, variant: str | None) -> None:
    """Diffusers would prefer an index, even one of an old name, to the single file that `weight_shapes` reads."""
    infix = f".{variant}" if variant else ""
    names = (f"{infix}.safetensors", f".safetensors.index{infix}.json", f".safetensors{infix}.index.json")
    files = [file for name in dict.fromkeys(names) if (file := folder / f"{WEIGHTS_STEM}{name}").is_file()]
    if len(files) > 1:
        raise ValueError(f"{folder} holds weights twice, {files[0].name} and {files[1].name}: remove one of them")


def _present_name(name: str, expected: dict[str, tuple[int, ...]]) -> str:
    if name in expected:
        return name
    path, _, parameter = name.rpartition(".")
    parent, _, layer = path.rpartition(".")
    present = f"{parent}.{_OLD_NAMES.get(layer, layer)}.{parameter}"
    return present if present in expected else name
