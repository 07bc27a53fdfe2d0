"""`metamorph recipes [NAME]`: list the recipes that ship with the package, or print one to copy and change."""

from collections.abc import Sequence

from metamorph.flags.parser import FlagParser
from metamorph.recipes import find_recipe, shipped_recipes


def main(argv: Sequence[str]) -> None:
    """Print the names and purposes, or one recipe."""
    parser = FlagParser(prog="metamorph recipes", description="List the recipes for `metamorph train --config NAME`.")
    parser.add_argument("name", nargs="?", metavar="NAME", help="print this recipe, for example to copy and change it")
    name = parser.parse_args(argv).name
    if name is not None:
        print(find_recipe(name, flag="").read_text(encoding="utf-8"), end="")
        return
    recipes = shipped_recipes()
    width = max(map(len, recipes))
    for recipe, purpose in recipes.items():
        print(f"{recipe:<{width}}  {purpose}")
