"""The connector file of stage 1 and of adapters: saving, reading (also LLaVA's and the original's), loading."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from metamorph.files.model_files import check_finite
from metamorph.files.permissions import save_file
from metamorph.runs.checkpoint_files import check_is_plain

from .embeddings import NEW_TOKENS, NewRows, new_token_ids
from .pretrained import read_tensors


logger = logging.getLogger(__name__)

CONNECTOR_FILE = "mm_projector.safetensors"
CONNECTOR_FILES = (CONNECTOR_FILE, "mm_projector.bin")  # the second is LLaVA's and the original's
WEIGHT_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
"""Files of a full model; the last two are the original's."""
OLD_PREFIXES = ("module.", "base_model.", "model.")  # wrappers in the keys of a .bin file
PARTS = {
    "mm_projector": "model.mm_projector.",
    "reduction": "model.vision_tower.reduction.",
    "vision_head": "vision_head.",
}
"""Part of a connector file -> prefix of its weights in the model."""
MATCHING_FIELDS = (
    "apply_softmax",
    "image_token_reduction",
    "mm_projector_type",
    "mm_use_im_start_end",
    "mm_vision_select_layer",
    "normalize_vision",
    "num_image_tokens",
)
"""Configuration that stage 2 should share with stage 1."""


@dataclass
class Connector:
    """Content of a connector file."""

    parts: dict[str, dict[str, Tensor]]
    """State dict of each of `PARTS`. The reduction's is empty unless it has weights (`mlpmixer`), and the vision head's
    when stage 1 did not train it."""
    rows: dict[str, dict[str, Tensor]]
    """`new_rows`: embedding row [hidden] of each new token. `new_head_rows`: its row of `lm_head`; none unless they are
    trained separately (adapters)."""
    config: dict[str, object]
    """The `MATCHING_FIELDS` it was trained with; empty for .bin files."""


def save_connector(model: PreTrainedModel, folder: str | Path, state_dict: Mapping[str, Tensor] | None = None) -> Path:
    """Save what stage 1 trains: connector, new tokens' embedding rows, and the vision head if it is trained.

    `state_dict` has the weights by their names in `model.state_dict()`, if those of `model` are sharded. Returns the
    path of the file.
    """
    weights = model.state_dict() if state_dict is None else state_dict
    tensors = {
        f"{part}.{name.removeprefix(prefix)}": value
        for part, prefix in PARTS.items()
        for name, value in weights.items()
        if name.startswith(prefix) and (part != "vision_head" or model.config.use_vision_ar)
    }
    tokens = new_token_ids(model.config)
    if tokens:
        tensors["new_rows"] = _rows_of(model, model.get_input_embeddings(), weights)
    if isinstance(model.get_output_embeddings(), NewRows):
        tensors["new_head_rows"] = _rows_of(model, model.get_output_embeddings(), weights)
    config = {name: getattr(model.config, name) for name in MATCHING_FIELDS}
    return write_connector(folder, tensors, list(tokens), config)


def write_connector(
    folder: str | Path, tensors: Mapping[str, Tensor], tokens: list[str], config: Mapping[str, object]
) -> Path:
    """Write a connector file and return its path.

    The tensors are named `mm_projector.…`, `reduction.…`, `vision_head.…`, `new_rows`, `new_head_rows`, with rows in
    the order of `tokens`; `config` has the `MATCHING_FIELDS` that are known.
    """
    metadata = {"format": "pt", "new_tokens": json.dumps(tokens), "config": json.dumps(dict(config))}
    path = Path(folder) / CONNECTOR_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    # Cloned, because safetensors refuses tensors that share memory.
    save_file({name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}, path, metadata)
    _sort_metadata(path)
    return path


def _sort_metadata(path: Path) -> None:
    """Sort the metadata, which safetensors writes in random order, so that equal connectors are equal files."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= size, "the sorted header must fit in place of the other"
        file.seek(8)
        file.write(text.ljust(size))


def load_connector(model: PreTrainedModel, path: str | Path) -> None:
    """Load a connector into `model`: its projector, the new tokens' rows, and the vision head if the file has one.

    `path` is `mm_projector.safetensors`, an `mm_projector.bin` of LLaVA or the original MetaMorph, or a folder with one
    of them. A file that does not fit is a `ValueError` that names sizes and flags.
    """
    file = find_connector(path)
    connector = read_connector(file)
    for name, value in connector.config.items():
        current = getattr(model.config, name, value)
        if current != value:
            logger.warning("the connector %s was trained with %s=%s, this run uses %s", file, name, value, current)
    for part, tensors in connector.parts.items():
        if tensors or part != "vision_head":
            _load_part(model.get_submodule(PARTS[part].removesuffix(".")), tensors, f"{file}: {part}")
    _load_rows(model, model.get_input_embeddings(), connector.rows["new_rows"], file, "the embedding")
    if connector.rows["new_head_rows"] and not model.config.tie_word_embeddings:
        _load_rows(model, model.get_output_embeddings(), connector.rows["new_head_rows"], file, "the row of lm_head")


def find_connector(path: str | Path) -> Path:
    """Find the connector file at `path`, a file or a folder; one of a finished model is refused."""
    path = Path(path)
    for file in (path, *(path / name for name in CONNECTOR_FILES)):
        if file.is_file():
            return file
    check_is_plain(path)
    if is_full_model(path):
        raise ValueError(
            f"{path} is a finished model, not a connector of stage 1: pass it as --model_name_or_path instead of "
            "--pretrain_mm_mlp_adapter"
        )
    raise FileNotFoundError(
        f"no connector at {path}: give stage 1's output folder or its {CONNECTOR_FILE} as --pretrain_mm_mlp_adapter"
    )


def read_connector(file: Path) -> Connector:
    """Read a `.safetensors` connector of ours, or a `.bin` file without running any code in it."""
    tensors, metadata = read_tensors(file)
    check_finite(tensors.items(), file)
    tokens = _read_metadata(metadata, "new_tokens", [], file)
    config = _read_metadata(metadata, "config", {}, file)
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in PARTS}
    rows: dict[str, dict[str, Tensor]] = {"new_rows": {}, "new_head_rows": {}}
    for key, value in tensors.items():
        name = key
        while name.startswith(OLD_PREFIXES):
            name = name.partition(".")[2]
        part, _, rest = name.partition(".")
        if part in parts:
            parts[part][rest] = value
        elif name in rows:
            if value.ndim != 2 or len(value) != len(tokens):
                raise ValueError(
                    f"{file} has rows of shape {list(value.shape)} for {len(tokens)} new tokens: it is damaged"
                )
            rows[name] = dict(zip(tokens, value, strict=True))
        elif name == "embed_tokens.weight":  # the full table, or its last rows: the new tokens were added last
            rows["new_rows"] = dict(zip(NEW_TOKENS, value[-len(NEW_TOKENS) :], strict=True))
    # A connector of type identity has no weights; files of ours have their configuration.
    if not parts["mm_projector"] and not config:
        raise ValueError(f"{file} holds no weights named mm_projector.*: it is not a connector of stage 1")
    return Connector(parts, rows, config)


def rewrite_connector(file: Path, folder: str | Path) -> Path:
    """Convert a connector file that can be read to one of ours, without its model, and return its path."""
    connector = read_connector(file)
    tensors = {f"{part}.{name}": value for part, own in connector.parts.items() for name, value in own.items()}
    tensors |= {name: torch.stack(list(rows.values())) for name, rows in connector.rows.items() if rows}
    return write_connector(folder, tensors, list(connector.rows["new_rows"]), connector.config)


def is_full_model(folder: str | Path) -> bool:
    """Whether `folder` holds the weights of a full model."""
    return any((Path(folder) / name).is_file() for name in WEIGHT_FILES)


def _read_metadata(metadata: Mapping[str, str], name: str, default: Any, file: Path) -> Any:
    """A value in the header of a connector file, of the type of `default`."""
    try:
        value = json.loads(metadata.get(name, json.dumps(default)))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: its {name} is not JSON ({error}): copy it again or rerun stage 1") from error
    if not isinstance(value, type(default)):
        raise ValueError(f"{file}: its {name} must be a {type(default).__name__}: copy it again or rerun stage 1")
    return value


def _rows_of(model: PreTrainedModel, table: nn.Module, weights: Mapping[str, Tensor]) -> Tensor:
    """[new tokens, hidden] of the embedding table or of `lm_head`."""
    prefix = next(name for name, module in model.named_modules() if module is table)
    if isinstance(table, NewRows):
        return weights[f"{prefix}.new_rows"]
    return weights[f"{prefix}.weight"][list(new_token_ids(model.config).values())]


@torch.no_grad()
def _load_rows(model: PreTrainedModel, table: Any, rows: Mapping[str, Tensor], file: Path, what: str) -> None:
    """Copy rows into the embedding table or `lm_head`, or into the rows that are attached to it."""
    for position, (token, number) in enumerate(new_token_ids(model.config).items()):
        if token not in rows:
            logger.warning("%s has no embedding of %s: it keeps its initial value", file, token)
            continue
        target = table.new_rows[position] if isinstance(table, NewRows) else table.weight[number]
        if rows[token].shape != target.shape:
            raise ValueError(
                f"{file}: {what} of {token} has {rows[token].shape[-1]} features, the language model "
                f"{target.shape[-1]}: the connector was trained for another --model_name_or_path"
            )
        target.copy_(rows[token])


def _load_part(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """`load_state_dict` with a message that names sizes and flags."""
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    if expected != found:
        raise ValueError(
            f"{source} does not fit this model: the file has {found or 'nothing'}, the model needs "
            f"{expected or 'nothing'}. Use the --model_name_or_path, --vision_tower, --image_token_reduction, "
            "--mm_projector_type and --vision_head_type of stage 1"
        )
    module.load_state_dict(tensors)
