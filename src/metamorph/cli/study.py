"""`metamorph study joint-vs-generation-only [--seeds 3]`: experiments on the miniature world."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from metamorph.flags.parser import FlagParser, at_least, output_folder


STUDIES = ("joint-vs-generation-only",)


def build_parser() -> argparse.ArgumentParser:
    """The flags of the command."""
    parser = FlagParser(
        prog="metamorph study", description="Train and compare miniatures on this machine, and plot what comes out."
    )
    parser.add_argument("name", choices=STUDIES, help="which study")
    parser.add_argument("--seeds", type=at_least(1), default=3, help="repetitions (default: %(default)s)")
    parser.add_argument(
        "--output-dir", type=output_folder, default=Path("study"), help="folder of the result (default: study)"
    )
    parser.add_argument(
        "--budgets",
        type=at_least(1),
        nargs="+",
        default=[1000, 2000, 4000],
        help="numbers of drawing records (default: 1000 2000 4000)",
    )
    parser.add_argument(
        "--passes", type=at_least(1), default=1, help="how often a record is seen (default: %(default)s)"
    )
    parser.add_argument(
        "--generation-per-step", type=at_least(1), default=16, help="drawing records of a batch (default: %(default)s)"
    )
    parser.add_argument(
        "--drawings", type=at_least(1), default=64, help="judged per model and group (default: %(default)s)"
    )
    return parser


def main(argv: Sequence[str]) -> None:
    """Run a study and print its table.

    Args:
        argv: Command line after `study`.
    """
    flags = build_parser().parse_args(argv)
    from metamorph.miniature.quickstart.options import require_extras

    require_extras()
    from metamorph.miniature.study import PLOT_FILE, StudyPlan, run_study

    plan = StudyPlan(
        flags.output_dir, flags.seeds, tuple(flags.budgets), flags.passes, flags.generation_per_step, flags.drawings
    )
    result = run_study(plan)
    print_summary(result["summary"])
    print(f"\nplot: {(flags.output_dir / PLOT_FILE).resolve()}")


def print_summary(rows: Sequence[dict]) -> None:
    """Print one line per group, budget and condition.

    Args:
        rows: As `metamorph.miniature.study.summarise_runs` makes them.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("drawings", "records", "trained on", "right", "± s.e.", "cosine", "seeds"):
        table.add_column(name, justify="left" if name in ("drawings", "trained on") else "right")
    for row in sorted(rows, key=lambda row: (row["group"] != "seen", row["budget"], row["condition"])):
        table.add_row(
            row["group"].replace("_", " "),
            str(row["budget"]),
            row["condition"],
            f"{row['mean']:.1%}",
            f"{row['standard_error']:.1%}",
            f"{row['cosine']:.3f}",
            str(row["n"]),
        )
    Console().print(table)
