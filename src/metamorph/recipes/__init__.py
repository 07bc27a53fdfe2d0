"""The recipes that ship with the package: YAML files of flags for each stage and model size."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from pathlib import Path


_FOLDER = Path(__file__).parent


def shipped_recipes() -> dict[str, str]:
    """The purpose of each recipe (the first line of its opening comment), by name."""
    files = sorted(_FOLDER.glob("*.yaml"))
    return {file.stem: file.read_text(encoding="utf-8").split("\n", 1)[0].lstrip("# ") for file in files}


def find_recipe(recipe: str, flag: str = "--config ") -> Path:
    """The file of that path or, if there is none, of the shipped recipe of that name, with or without `.yaml`.

    If it is neither, raises a `FileNotFoundError` that begins with `flag` and names similar recipes.
    """
    path = Path(recipe).expanduser()
    if path.is_file():
        return path
    names = list(shipped_recipes())
    name = recipe.removesuffix(".yaml")
    if name in names:
        return _FOLDER / f"{name}.yaml"
    near = difflib.get_close_matches(path.name.removesuffix(".yaml"), names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"give a YAML file of flags or one of {', '.join(names)}"
    raise FileNotFoundError(f"{flag}{recipe} is neither a file nor the name of a recipe (`metamorph recipes`): {hint}")


def config_flag(argv: Sequence[str]) -> str | None:
    """The last value of `--config`, which `find_recipe` must find.

    Commands call this before they import PyTorch, so that a typo fails at once.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config")
    try:
        recipe = parser.parse_known_args(argv)[0].config
    except argparse.ArgumentError:
        hint = "--config needs the path of a YAML file or the name of a recipe (`metamorph recipes`)"
        raise ValueError(hint) from None
    if recipe is not None:
        find_recipe(recipe)
    return recipe
