"""The recipes that ship with the package: YAML files of flags for each stage and model size."""

from __future__ import annotations

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

    Raises:
        FileNotFoundError: If it is neither; the message begins with `flag` and names similar recipes.
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
    """The last value of `--config`. Commands call this before they import PyTorch, so that a typo fails at once.

    Raises:
        FileNotFoundError: If it is neither a file nor a recipe.
        ValueError: If the value is missing.
    """
    recipe = None
    for position, text in enumerate(argv):
        if text == "--config":
            if position + 1 == len(argv):
                raise ValueError("--config needs the path of a YAML file or the name of a recipe (`metamorph recipes`)")
            recipe = argv[position + 1]
        elif text.startswith("--config="):
            recipe = text.removeprefix("--config=")
    if recipe is not None:
        find_recipe(recipe)
    return recipe
