"""`metamorph evaluate SPEC | world | loss | visualizer | overlap`: a model, a visualizer alone, or training data."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from metamorph.cli import evaluate_loss, evaluate_overlap, evaluate_spec, evaluate_visualizer
from metamorph.flags.checks import check_metamorph_model, check_reachable
from metamorph.flags.parser import FlagParser, at_least, output_file, output_folder
from metamorph.mini import shipped_folder


SPEC = "SPEC"
"""Name of the parser of benchmarks, whose own names are not commands."""


def main(argv: Sequence[str]) -> int | None:
    """Evaluate and print a table; 1 if answers of a benchmark are errors."""
    parser = FlagParser(
        prog="metamorph evaluate",
        description="Evaluate a trained model: on a benchmark, data, or the miniature world; or a visualizer alone.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--list", action="store_true", help="list the benchmarks that ship with MetaMorph")
    compare_help = "compare two results of a benchmark: result.json files, or their folders"
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help=compare_help)
    output_help = "JSON file of the comparison; a plot of the same name is written next to it"
    # `loss` has an --output, too, whose value must not be taken for this one.
    parser.add_argument("--output", dest="comparison", type=output_file, help=output_help)
    kinds = parser.add_subparsers(dest="kind")
    spec = kinds.add_parser(SPEC, help="a benchmark by its name, or a YAML file")
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
    evaluate_overlap.add_flags(
        kinds.add_parser("overlap", help="images and questions of benchmarks that are in training data")
    )
    commands = [name for name in kinds.choices if name != SPEC]
    evaluate_spec.add_flags(spec, commands)
    parser.epilog = "\n".join(kind.format_usage() for kind in kinds.choices.values())
    words = list(argv)
    if words and words[0] not in commands and (not words[0].startswith("-") or _is_only_in(spec, parser, words[0])):
        words.insert(0, SPEC)
    flags = parser.parse_args(words)
    if flags.comparison is not None and flags.compare is None:
        raise ValueError(f"--output {flags.comparison} needs --compare, two results")
    if flags.kind is not None and (flags.list or flags.compare is not None):
        raise ValueError(f"--{'list' if flags.list else 'compare'} and {words[-1]!r}: give one of them")
    if flags.compare is not None:
        evaluate_spec.compare_results(flags.compare, flags.comparison)
    elif flags.list:
        evaluate_spec.print_specs()
    elif flags.kind is None:
        raise ValueError(f"say what to evaluate: a benchmark (metamorph evaluate --list), or {', '.join(commands)}")
    else:
        return flags.run(flags)
    return None


def _is_only_in(kind: argparse.ArgumentParser, parser: argparse.ArgumentParser, word: str) -> bool:
    """Whether a word is a flag of a subcommand, whose name then comes later, and not one of the command itself."""
    own, of_kind = ({flag.replace("_", "-") for flag in each._option_string_actions} for each in (parser, kind))
    return word.partition("=")[0].replace("_", "-") in of_kind - own


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
