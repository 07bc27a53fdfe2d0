"""Model cards of the shipped assets, and the check that a folder matches its card.

A card is the `README.md` of an asset's folder: a YAML head for programs (seed, recipe, figures, SHA-256 of every file)
and the same facts as text. `tools/miniature/cards.py` in a checkout writes it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml


CARD_FILE = "README.md"
HEAD_MARK = "---\n"


class AssetError(ValueError):
    """A shipped asset is missing, incomplete or not the one that its card describes."""


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
