"""`python -m tools.miniature.rebuild [NAME …]`, from the root of a checkout: builds shipped miniatures from scratch."""

from __future__ import annotations

import argparse
import importlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metamorph import mini
from metamorph.mini import ASSETS, AssetError


logger = logging.getLogger(__name__)

_BUILDERS = {
    "mini-siglip": "tools.miniature.build_siglip",
    "mini-llama": "tools.miniature.build_llama",
    "mini-sd": "tools.miniature.build_sd",
    "mini": "tools.miniature.build_mini",
}


def rebuild(
    names: Sequence[str] = ASSETS,
    output_dir: Path | None = None,
    *,
    seed: int = 0,
    resume: bool = True,
) -> dict[str, Any]:
    """Build assets from scratch, each in its turn, stopping at the first that misses its gate.

    Args:
        names: Which assets; they are built in the order of `ASSETS` whatever the order here.
        output_dir: Folder that gets one folder per asset; by default the package's own, whose assets are
            replaced one by one as soon as the new one has passed its gate.
        seed: Seed of every build.
        resume: Whether to continue interrupted builds.

    Returns:
        The figures of each built asset.

    Raises:
        ValueError: There is no asset of one of the names.
        AssetError: An asset misses its gate.
    """
    wanted = {name if name in ASSETS else f"mini-{name}" for name in names}
    if unknown := wanted - {*ASSETS}:
        raise ValueError(f"there is no asset {min(unknown)!r}: choose among {', '.join(ASSETS)}")
    root = output_dir or Path(mini.__file__).parent
    figures = {}
    for name in ASSETS:
        if name in wanted:
            logger.info("building %s into %s", name, root / name)
            builder = importlib.import_module(_BUILDERS[name])
            figures[name] = builder.build(root / name, seed=seed, resume=resume)
    return figures


def main() -> None:
    """Build the assets named on the command line and print their figures."""
    parser = argparse.ArgumentParser(prog="python -m tools.miniature.rebuild", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"among {', '.join(ASSETS)} (default: all)")
    parser.add_argument("--output-dir", type=Path, help="gets a folder for each (default: the package's own)")
    parser.add_argument("--seed", type=int, default=0, help="of every build (default: 0)")
    flags = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    try:
        figures = rebuild(flags.names or ASSETS, flags.output_dir, seed=flags.seed)
    except (AssetError, ValueError) as error:
        parser.error(str(error))
    for name, values in figures.items():
        print(f"{name}: {values}")


if __name__ == "__main__":
    main()
