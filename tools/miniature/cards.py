"""Write the model card of a finished asset."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from metamorph.mini.cards import CARD_FILE, HEAD_MARK, AssetCard, file_hashes, library_versions, read_card


_ORIGIN = "_name_or_path"


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
