"""`metamorph evaluate world | loss | visualizer`: how good a finished model, or a visualizer alone, is."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from metamorph.cli import evaluate_loss, evaluate_visualizer
from metamorph.flags.checks import check_metamorph_model, check_reachable
from metamorph.flags.parser import FlagParser, at_least, output_folder


def build_parser() -> argparse.ArgumentParser:
    """The flags of the command."""
    parser = FlagParser(
        prog="metamorph evaluate",
        description="Measure a finished model.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    world = kinds.add_parser("world", help="questions and drawings of the miniature world, judged by its pixel checker")
    world.add_argument("--model", default="mini", help="folder of the model (default: mini, the shipped one)")
    world.add_argument("--visualizer", default="mini", help="folder of the visualizer (default: mini)")
    world.add_argument(
        "--output-dir", type=output_folder, default=Path("evaluation"), help="gets metrics.json and grids"
    )
    world.add_argument("--seed", type=at_least(0), help="of scenes, words and noise (default: the one of mini's card)")
    evaluate_loss.add_flags(kinds.add_parser("loss", help="text and visual loss on data, for each source"))
    evaluate_visualizer.add_flags(
        kinds.add_parser("visualizer", help="pictures drawn again from their own visual tokens, compared with them")
    )
    parser.epilog = "\n".join(kind.format_usage() for kind in kinds.choices.values())
    return parser


def main(argv: Sequence[str]) -> None:
    """Evaluate and print a table.

    Args:
        argv: Command line after `evaluate`.
    """
    flags = build_parser().parse_args(argv)
    if flags.kind == "loss":
        evaluate_loss.run(flags)
        return
    if flags.kind == "visualizer":
        evaluate_visualizer.run(flags)
        return
    from metamorph.cli.shared import use_shipped
    from metamorph.miniature.quickstart.options import require_extras

    require_extras()
    use_shipped(flags)
    check_metamorph_model(flags.model, flag="--model")
    check_reachable(flags.visualizer, flag="--visualizer", file="model_index.json")
    from metamorph.cli.shared import print_table
    from metamorph.miniature.quickstart.measure import measure_world
    from metamorph.miniature.quickstart.recipe import MINI_EVALUATION_SEED
    from metamorph.miniature.quickstart.report import headline

    seed = MINI_EVALUATION_SEED if flags.seed is None else flags.seed
    measured = measure_world(flags.model, flags.visualizer, flags.output_dir, seed=seed)
    print_table(headline({**measured.metrics, "floors": {}}))
    print(f"\npictures and metrics.json: {flags.output_dir.resolve()}")
