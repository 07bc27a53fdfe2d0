"""`metamorph quickstart [--output-dir out] [--seed 0] [--fast]`: the entire system in miniature, with a report."""

import logging
from collections.abc import Sequence
from pathlib import Path

from metamorph.cli.shared import print_headline
from metamorph.flags.parser import FlagParser, at_least, output_folder


logger = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> None:
    """Run the quickstart and print its result."""
    parser = FlagParser(
        prog="metamorph quickstart",
        description="Train a miniature of the entire system on this machine, evaluate it and write a report.",
    )
    parser.add_argument("--output-dir", type=output_folder, default=Path("out"), help="output folder")
    parser.add_argument("--seed", type=at_least(0), default=0, help="random seed")
    parser.add_argument("--fast", action="store_true", help="run a few steps of each part, to see that it works")
    parser.add_argument("--assets-dir", type=Path, help="folder with other mini-siglip, mini-llama and mini-sd")
    flags = parser.parse_args(argv)
    from metamorph.miniature.quickstart.workspace import REPORT_FILE, open_workspace, require_extras

    require_extras()
    space = open_workspace(flags.output_dir, flags.assets_dir, flags.seed)
    logger.info("loading libraries …")
    from metamorph.miniature.quickstart.run import run_quickstart  # after the checks: takes seconds
    from metamorph.runs.progress import duration

    metrics = run_quickstart(space, fast=flags.fast)
    print_headline(metrics)
    if flags.fast:
        print("\n--fast only shows that every part runs: nothing is learned in so few steps, so ignore the figures.")
    print(f"\n{duration(metrics['seconds']['total'])}, peak memory {metrics['peak_rss_mb']:.0f} MB")
    print(f"report: {(space.root / REPORT_FILE).resolve()}")
