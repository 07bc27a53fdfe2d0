"""What a wheel holds beside the code."""

import glob
from pathlib import Path

import pytest

import metamorph.quickstart.assets as assets


tomllib = pytest.importorskip("tomllib", reason="part of Python from 3.11 on")


def test_a_wheel_ships_all_files_of_the_assets_and_nothing_else() -> None:
    settings = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    package = Path(assets.__file__).parents[1]
    shipped = {
        Path(found)
        for pattern in settings["tool"]["setuptools"]["package-data"]["metamorph.quickstart"]
        for found in glob.glob(pattern, root_dir=package, recursive=True)
        if (package / found).is_file()
    }
    wanted = {
        path.relative_to(package)
        for folder in assets.ASSETS
        for path in (package / "assets" / folder).rglob("*")
        if path.is_file()
    }
    assert shipped == wanted
    assert {path.parts[1] for path in shipped} == set(assets.ASSETS)
