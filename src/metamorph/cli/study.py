"""`metamorph study joint-vs-generation-only | data-grid`: experiments in the miniature world."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metamorph.flags.parser import FlagParser, at_least, output_folder


if TYPE_CHECKING:
    from metamorph.miniature.study import Mixture


def main(argv: Sequence[str]) -> None:
    """Run a study, print its table and plot it."""
    parser = FlagParser(
        prog="metamorph study",
        description="Train and compare miniature models on this machine, and plot the result.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    studies = parser.add_subparsers(dest="name", required=True)
    joint = studies.add_parser("joint-vs-generation-only", help="drawings with and without questions, at equal steps")
    _add_common_flags(joint, world="basic", budgets=[1000, 2000, 4000])
    joint.add_argument("--passes", type=at_least(1), default=1, help="number of epochs")
    joint.add_argument("--generation-per-step", type=at_least(1), default=16, help="drawing records per batch")
    joint.set_defaults(mixtures=_joint_mixtures)
    grid = studies.add_parser("data-grid", help="every number of questions with every number of drawing records")
    _add_common_flags(grid, world="rich", budgets=[0, 1000, 2000, 4000])
    help_text = "numbers of images with questions"
    grid.add_argument("--questions", type=at_least(0), nargs="+", default=[0, 500, 2000], help=help_text)
    steps_help = "optimizer steps of every model; batches are as large as its data needs"
    grid.add_argument("--steps", type=at_least(1), default=250, help=steps_help)
    grid.set_defaults(mixtures=_grid_mixtures)
    parser.epilog = "\n".join(study.format_usage() for study in studies.choices.values())
    flags = parser.parse_args(argv)
    from metamorph.miniature.quickstart.workspace import require_extras

    require_extras()
    from metamorph.cli.shared import print_table
    from metamorph.miniature.study import StudySettings, run_study

    settings = StudySettings(
        flags.output_dir, flags.name, flags.mixtures(flags), flags.seeds, flags.world, flags.drawings, flags.asked
    )
    header = ("group", "drawing records", "questions", "right", "± s.e.", "cosine", "nearest", "seeds")
    print_table(header, map(_cells, run_study(settings)["summary"]))
    print(f"\nplots: {(flags.output_dir / flags.name).resolve()}*.png")


def _add_common_flags(parser: argparse.ArgumentParser, *, world: str, budgets: list[int]) -> None:
    parser.add_argument("--seeds", type=at_least(1), default=3, help="number of repetitions")
    parser.add_argument("--output-dir", type=output_folder, default=Path("study"), help="output folder")
    world_help = "basic: one object or two; rich: two or three with relations, counts and longer sentences"
    parser.add_argument("--world", choices=("basic", "rich"), default=world, help=world_help)
    parser.add_argument("--budgets", type=at_least(0), nargs="+", default=budgets, help="numbers of drawing records")
    parser.add_argument("--drawings", type=at_least(1), default=64, help="drawings per model and group that are judged")
    parser.add_argument("--asked", type=at_least(1), default=200, help="questions per model that are judged")


def _joint_mixtures(flags: argparse.Namespace) -> "tuple[Mixture, ...]":
    from metamorph.miniature.study import joint_mixtures

    return joint_mixtures(flags.budgets, flags.generation_per_step, flags.passes)


def _grid_mixtures(flags: argparse.Namespace) -> "tuple[Mixture, ...]":
    from metamorph.miniature.study import grid_mixtures

    return grid_mixtures(flags.questions, flags.budgets, flags.steps)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row of the summary as text."""
    tokens = (f"{row[name]:.3f}" if name in row else "" for name in ("cosine", "nearest"))
    numbers = (str(row["drawings"]), str(row["questions"]), f"{row['mean']:.1%}", f"{row['standard_error']:.1%}")
    return (row["group"].replace("_", " "), *numbers, *tokens, str(row["n"]))
