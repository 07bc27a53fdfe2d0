"""Model cards of the shipped assets, and the check that a folder still is what its card says.

A card is the `README.md` of an asset's folder: a YAML head that programs read (seed, recipe, figures, SHA-256
of every file) and the same facts in words for people.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml


CARD_FILE = "README.md"
_HEAD_MARK = "---\n"
_ORIGIN = "_name_or_path"


class AssetError(ValueError):
    """A shipped asset is missing, incomplete or not the one that its card describes."""


@dataclass(frozen=True)
class AssetCard:
    """What is known about one asset."""

    name: str
    """Name of the asset, such as `mini-siglip`."""
    summary: str
    """One paragraph in words: what it is and how it was made."""
    build_command: str
    """The command that builds it again."""
    seed: int
    """Seed of the build."""
    seconds: float
    """Wall-clock seconds of the build, over all its resumed parts."""
    recipe: dict[str, Any]
    """Hyper-parameters of the build."""
    figures: dict[str, Any]
    """Measured quality, read with the weights as shipped."""
    gates: dict[str, float] = field(default_factory=dict)
    """The least that each figure must reach before the asset may be used."""
    versions: dict[str, str] = field(default_factory=dict)
    """Versions of the libraries that built it."""
    sha256: dict[str, str] = field(default_factory=dict)
    """SHA-256 of every file of the folder except the card, by relative path."""


def file_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file under `folder` except its card, by relative POSIX path in sorted order."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / CARD_FILE)
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def forget_local_paths(folder: Path) -> None:
    """Remove from all JSON files where on the builder's machine a part was loaded from (`_name_or_path`).

    `save_pretrained` keeps that of nested configurations and of diffusers' parts; it means nothing elsewhere.
    """
    for path in sorted(folder.rglob("*.json")):
        text = path.read_text(encoding="utf-8")
        if _ORIGIN in text:
            values = json.loads(text, object_hook=lambda found: {k: v for k, v in found.items() if k != _ORIGIN})
            path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def library_versions() -> dict[str, str]:
    """Versions of the libraries that decide what a build computes."""
    import numpy
    import torch
    import transformers

    return {
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "numpy": numpy.__version__,
    }


def write_card(folder: Path, card: AssetCard) -> AssetCard:
    """Write the card of the finished asset in `folder`, without local paths in its files, and hash them.

    Args:
        folder: The asset's folder, with all its files in place.
        card: The facts; `sha256` and `versions` are filled in here.

    Returns:
        The card as written.
    """
    forget_local_paths(folder)
    head = {
        "license": "apache-2.0",
        "metamorph_asset": {
            "name": card.name,
            "seed": card.seed,
            "seconds": round(card.seconds, 1),
            "recipe": card.recipe,
            "figures": card.figures,
            "gates": card.gates,
            "versions": card.versions or library_versions(),
            "sha256": file_hashes(folder),
        },
    }
    text = (
        _HEAD_MARK
        + yaml.safe_dump(head, sort_keys=False, allow_unicode=True, width=110)
        + _HEAD_MARK
        + f"\n# {card.name}\n\n{card.summary}\n\n"
        + f"Built with `{card.build_command}`: seed {card.seed}, {card.seconds / 3600:.2f} hours.\n\n"
        + "## Figures\n\n"
        + _table(("figure", "value", "gate"), _figure_rows(card))
        + "\n## Recipe\n\n"
        + _table(("setting", "value"), [(key, str(value)) for key, value in card.recipe.items()])
    )
    (folder / CARD_FILE).write_text(text, encoding="utf-8")
    return read_card(folder)


def read_card(folder: Path) -> AssetCard:
    """Read the card of the asset in `folder`.

    Raises:
        AssetError: There is no card, or its head is not one that `write_card` wrote.
    """
    path = folder / CARD_FILE
    if not path.is_file():
        raise AssetError(f"{folder} has no model card {CARD_FILE}: it is no finished asset")
    parts = path.read_text(encoding="utf-8").split(_HEAD_MARK, 2)
    facts = yaml.safe_load(parts[1]).get("metamorph_asset") if len(parts) == 3 else None
    if not isinstance(facts, dict):
        raise AssetError(f"{path} does not begin with a head that has `metamorph_asset`")
    return AssetCard(summary=parts[2].strip(), build_command="", **facts)


def verify_folder(folder: Path) -> AssetCard:
    """Check that the files in `folder` are those that its card names.

    Returns:
        The card.

    Raises:
        AssetError: A file is missing, changed, or not on the card; the message names it.
    """
    card = read_card(folder)
    found = file_hashes(folder)
    missing = sorted(card.sha256.keys() - found.keys())
    unknown = sorted(found.keys() - card.sha256.keys())
    changed = sorted(name for name in card.sha256.keys() & found.keys() if card.sha256[name] != found[name])
    if missing or unknown or changed:
        raise AssetError(
            f"{folder} is not what its card describes: missing {missing}, changed {changed}, "
            f"not on the card {unknown}: install the package again"
        )
    return card


def _figure_rows(card: AssetCard) -> list[tuple[str, ...]]:
    flat: dict[str, Any] = {}
    for key, value in card.figures.items():
        if isinstance(value, dict):
            flat.update({f"{key}.{inner}": figure for inner, figure in value.items()})
        else:
            flat[key] = value
    return [
        (
            name,
            f"{value:.4g}" if isinstance(value, float) else str(value),
            str(card.gates.get(name, card.gates.get(name.rsplit(".", 1)[-1], ""))),
        )
        for name, value in flat.items()
    ]


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
