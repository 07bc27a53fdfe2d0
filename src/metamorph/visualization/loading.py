"""Load a finished visualizer together with the vision tower whose tokens it draws."""

from dataclasses import fields
from pathlib import Path

import torch

from metamorph.files.model_files import read_json_object
from metamorph.flags.checks import check_reachable, errors_name_flag
from metamorph.mini import shipped_folder
from metamorph.models.vision_tower import resolve_vision_tower
from metamorph.visualization.encoder import VisualTokenEncoder
from metamorph.visualization.folders import ARGUMENTS_FILE, INDEX_FILE, local_folder
from metamorph.visualization.pipeline import VisualizationPipeline
from metamorph.visualization.token_options import TokenOptions, adopt_token_options, load_encoder


def load_visualizer(
    folder: str | Path,
    vision_tower: str | None = None,
    num_tokens: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> VisualizationPipeline:
    """Load a visualizer that can encode images.

    Args:
        folder: Result of `metamorph train-visualizer`, or a Hub id.
        vision_tower: The tower, or the folder of a MetaMorph model. By default the one in the folder or, if there is
            none, the one that the visualizer was trained with, as visualizer_arguments.json names it.
        num_tokens: Visual tokens per image; by default as in training. Has no effect with the tower of the folder or
            of a MetaMorph model, which fix their number.
    """
    folder = shipped_folder(str(folder), "visualizer")
    check_reachable(folder, flag="--visualizer", file=INDEX_FILE)
    with errors_name_flag("--visualizer", str(folder)):
        folder = local_folder(folder)
        pipeline = VisualizationPipeline.from_pretrained(folder, torch_dtype=dtype)
    if vision_tower is not None or pipeline.vision_tower is None:
        encoder = _load_tower(folder, vision_tower, num_tokens)
        encoder.tower.to(dtype)
        pipeline.register_modules(vision_tower=encoder)
    projector, encoder = pipeline.projector.config, pipeline.vision_tower
    if encoder.num_features != projector.input_dim:
        raise ValueError(
            f"--vision_tower gives visual tokens of {encoder.num_features} features, but --visualizer {folder} was "
            f"trained on {projector.input_dim}: give the tower it was trained with"
        )
    if projector.num_positions and projector.num_positions != encoder.config.num_image_tokens:
        raise ValueError(
            f"--vision_tower gives {encoder.config.num_image_tokens} visual tokens per image, but --visualizer "
            f"{folder} was trained on {projector.num_positions}: set --num_tokens {projector.num_positions}"
        )
    return pipeline


def _load_tower(folder: str | Path, vision_tower: str | None, num_tokens: int | None) -> VisualTokenEncoder:
    options = _trained_token_options(folder)
    if vision_tower is not None:
        options["vision_tower"] = shipped_folder(vision_tower, "model")
    if num_tokens is not None:
        options["num_tokens"] = num_tokens
    if "vision_tower" not in options:
        raise ValueError(
            f"--visualizer {folder} has neither a vision tower nor {ARGUMENTS_FILE}, which would name it: give "
            "--vision_tower, the tower it was trained with or the folder of the MetaMorph model"
        )
    name = str(options["vision_tower"])
    check_reachable(resolve_vision_tower(name), "--vision_tower")
    with errors_name_flag("--vision_tower", name):
        return load_encoder(adopt_token_options(TokenOptions(**options)))  # type: ignore[arg-type]


def _trained_token_options(folder: str | Path) -> dict[str, str | int | bool]:
    """Vision tower and token options that the visualizer was trained with, as far as its folder records them."""
    file = Path(folder).expanduser() / ARGUMENTS_FILE
    values = read_json_object(file) if file.is_file() else {}
    options = {field.name: values[field.name] for field in fields(TokenOptions) if field.name in values}
    for field in fields(TokenOptions):
        kind = type(field.default)
        if type(value := options.get(field.name, field.default)) is not kind:
            raise ValueError(f"{file}: {field.name} must be a {kind.__name__}, not {value!r}: copy the folder again")
    return options
