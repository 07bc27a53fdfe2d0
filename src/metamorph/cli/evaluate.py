"""`metamorph evaluate world | loss | visualizer`: evaluate a trained model, or a visualizer alone."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from metamorph.cli import evaluate_loss, evaluate_visualizer
from metamorph.flags.checks import check_metamorph_model, check_reachable
from metamorph.flags.parser import FlagParser, at_least, output_folder
from metamorph.mini import shipped_folder


def main(argv: Sequence[str]) -> None:
    """Evaluate and print a table."""
    parser = FlagParser(
        prog="metamorph evaluate",
        description="Evaluate a trained model, or a visualizer alone.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    world = kinds.add_parser("world", help="questions and drawings in the miniature world, judged by its pixel checker")
    world.add_argument("--model", default="mini", help="folder or Hub id of the model; mini ships with MetaMorph")
    world.add_argument("--visualizer", default="mini", help="folder or Hub id of the visualizer")
    output_help = "folder of metrics.json and grids of images"
    world.add_argument("--output-dir", type=output_folder, default=Path("evaluation"), help=output_help)
    world.add_argument(
        "--seed", type=at_least(0), help="seed of scenes, words and noise (default: that of the figures on mini's card)"
    )
    world.set_defaults(run=_evaluate_world)
    evaluate_loss.add_flags(kinds.add_parser("loss", help="text and visual loss on data, by source"))
    evaluate_visualizer.add_flags(
        kinds.add_parser("visualizer", help="similarity of images and their drawings from their own visual tokens")
    )
    parser.epilog = "\n".join(kind.format_usage() for kind in kinds.choices.values())
    flags = parser.parse_args(argv)
    flags.run(flags)


def _evaluate_world(flags: argparse.Namespace) -> None:
    from metamorph.miniature.quickstart.workspace import require_extras

    require_extras()
    model, visualizer = shipped_folder(flags.model, "model"), shipped_folder(flags.visualizer, "visualizer")
    check_metamorph_model(model, flag="--model")
    check_reachable(visualizer, flag="--visualizer", file="model_index.json")
    from metamorph.cli.shared import print_headline
    from metamorph.miniature.quickstart.measure import measure_world

    seed = {} if flags.seed is None else {"seed": flags.seed}
    metrics = measure_world(model, visualizer, flags.output_dir, **seed)
    print_headline({**metrics, "floors": {}})
    print(f"\nimages and metrics.json: {flags.output_dir.resolve()}")
