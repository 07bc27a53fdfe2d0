"""`metamorph quickstart [--output-dir out] [--seed 0] [--fast]`: the whole system in miniature, with a report."""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from metamorph.cli.shared import print_table
from metamorph.flags.parser import FlagParser, at_least, output_folder


logger = logging.getLogger(__name__)


def build_parser() -> argparse.ArgumentParser:
    """The flags of the command."""
    parser = FlagParser(
        prog="metamorph quickstart",
        description="Train the whole system in miniature on this machine, evaluate it and write a report.",
    )
    parser.add_argument(
        "--output-dir", type=output_folder, default=Path("out"), help="folder of the result (default: out)"
    )
    parser.add_argument("--seed", type=at_least(0), default=0, help="of data, weights and noise (default: 0)")
    parser.add_argument("--fast", action="store_true", help="a few steps of everything: shows that it runs")
    parser.add_argument("--assets-dir", type=Path, help="folder with mini-siglip, mini-llama and mini-sd")
    return parser


def main(argv: Sequence[str]) -> None:
    """Run the quickstart.

    Args:
        argv: Command line after `quickstart`.
    """
    flags = build_parser().parse_args(argv)
    from metamorph.miniature.quickstart.options import require_extras

    require_extras()
    run(flags)


def run(flags: argparse.Namespace) -> None:
    """Run the quickstart and print its result.

    Args:
        flags: The command line.
    """
    from metamorph.miniature.quickstart.options import QuickstartOptions

    options = QuickstartOptions(flags.output_dir, flags.seed, flags.fast, flags.assets_dir)
    logger.info("loading libraries …")
    # Takes seconds to import, so only after the flags are known to be good.
    from metamorph.miniature.quickstart.report import headline
    from metamorph.miniature.quickstart.run import run_quickstart
    from metamorph.runs.progress import duration

    result = run_quickstart(options)
    print_table(headline(result.metrics))
    if flags.fast:
        print(
            "\n--fast only shows that every part runs: nothing is learnt in so few steps, so the figures mean nothing."
        )
    seconds, memory = result.metrics["seconds"]["total"], result.metrics["peak_rss_mb"]
    print(f"\n{duration(seconds)}, peak memory {memory:.0f} MB")
    print(f"report: {result.report.resolve()}")
