"""Model cards of the shipped assets: written after a build, and checked against the folder.

A card is the `README.md` of an asset's folder: a YAML head for programs (seed, recipe, figures, SHA-256 of every file)
and the same facts as text.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from metamorph.mini import AssetError, asset_path


CARD_FILE = "README.md"
HEAD_MARK = "---\n"
_ORIGIN = "_name_or_path"


@dataclass(frozen=True)
class AssetCard:
    """The facts on a card."""

    name: str
    """Name of the asset, such as `mini-siglip`."""
    summary: str
    """One paragraph: what it is and how it was made."""
    build_command: str
    seed: int
    seconds: float
    """Wall-clock seconds of the build, over all its resumed parts."""
    recipe: dict[str, Any]
    figures: dict[str, Any]
    """Measured quality, of the weights as shipped."""
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


def library_versions() -> dict[str, str]:
    """Versions of the libraries that decide what a build computes."""
    return {library: importlib.metadata.version(library) for library in ("torch", "transformers", "numpy")}


def read_card(folder: Path) -> AssetCard:
    """Read the card of the asset in `folder`; an AssetError if there is none, or it has no valid head."""
    path = folder / CARD_FILE
    if not path.is_file():
        raise AssetError(f"{folder} has no model card {CARD_FILE}: it is no finished asset")
    parts = path.read_text(encoding="utf-8").split(HEAD_MARK, 2)
    facts = yaml.safe_load(parts[1]).get("metamorph_asset") if len(parts) == 3 else None
    if not isinstance(facts, dict):
        raise AssetError(f"{path} does not begin with a head that has `metamorph_asset`")
    return AssetCard(summary=parts[2].strip(), build_command="", **facts)


def verify_folder(folder: Path) -> AssetCard:
    """Return the card; an AssetError names files that are missing, changed, or not on the card."""
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


def verify_asset(name: str) -> AssetCard:
    """The card of a shipped model; see `verify_folder`."""
    return verify_folder(asset_path(name))


def write_card(folder: Path, card: AssetCard) -> AssetCard:
    """Write the card of the asset in `folder`, after removing local paths from its files, and return it as written.

    `sha256` and, unless given, `versions` are filled in.
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
        HEAD_MARK
        + yaml.safe_dump(head, sort_keys=False, allow_unicode=True, width=110)
        + HEAD_MARK
        + f"\n# {card.name}\n\n{card.summary}\n\n"
        + f"Built with `{card.build_command}`: seed {card.seed}, {card.seconds / 3600:.2f} hours.\n\n"
        + "## Figures\n\n"
        + _table(("figure", "value", "gate"), _figure_rows(card))
        + "\n## Recipe\n\n"
        + _table(("setting", "value"), [(key, str(value)) for key, value in card.recipe.items()])
    )
    (folder / CARD_FILE).write_text(text, encoding="utf-8")
    return read_card(folder)


def forget_local_paths(folder: Path) -> None:
    """Remove `_name_or_path`, where a part was loaded from on the builder's machine, from all JSON files.

    `save_pretrained` keeps it in nested configurations and in those of diffusers' parts.
    """
    for path in sorted(folder.rglob("*.json")):
        text = path.read_text(encoding="utf-8")
        if _ORIGIN in text:
            values = json.loads(text, object_hook=lambda found: {k: v for k, v in found.items() if k != _ORIGIN})
            path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


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
