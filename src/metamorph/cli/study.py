"""`metamorph study joint-vs-generation-only [--seeds 3]`: experiments in the miniature world."""

from collections.abc import Sequence
from pathlib import Path

from metamorph.flags.parser import FlagParser, at_least, output_folder


STUDIES = ("joint-vs-generation-only",)


def main(argv: Sequence[str]) -> None:
    """Run a study, print its table and plot it."""
    parser = FlagParser(
        prog="metamorph study", description="Train and compare miniature models on this machine, and plot the result."
    )
    parser.add_argument("name", choices=STUDIES, help="the experiment")
    parser.add_argument("--seeds", type=at_least(1), default=3, help="number of repetitions")
    parser.add_argument("--output-dir", type=output_folder, default=Path("study"), help="output folder")
    budgets = [1000, 2000, 4000]
    parser.add_argument("--budgets", type=at_least(1), nargs="+", default=budgets, help="numbers of drawing records")
    parser.add_argument("--passes", type=at_least(1), default=1, help="number of epochs")
    parser.add_argument("--generation-per-step", type=at_least(1), default=16, help="drawing records per batch")
    parser.add_argument("--drawings", type=at_least(1), default=64, help="drawings per model and group")
    flags = parser.parse_args(argv)
    from metamorph.miniature.quickstart.workspace import require_extras

    require_extras()
    from metamorph.cli.shared import print_table
    from metamorph.miniature.study import PLOT_FILE, StudySettings, run_study

    settings = StudySettings(
        flags.output_dir, flags.seeds, tuple(flags.budgets), flags.passes, flags.generation_per_step, flags.drawings
    )
    rows = run_study(settings)["summary"]
    cells = (
        (
            row["group"].replace("_", " "),
            str(row["budget"]),
            row["condition"],
            f"{row['mean']:.1%}",
            f"{row['standard_error']:.1%}",
            f"{row['cosine']:.3f}",
            str(row["n"]),
        )
        for row in sorted(rows, key=lambda row: (row["group"] != "seen", row["budget"], row["condition"]))
    )
    print_table(("drawings", "records", "trained on", "right", "± s.e.", "cosine", "seeds"), cells)
    print(f"\nplot: {(flags.output_dir / PLOT_FILE).resolve()}")
