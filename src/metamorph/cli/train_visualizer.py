"""`metamorph train-visualizer --config recipe.yaml [--flag value …]`."""

from collections.abc import Sequence

from metamorph.recipes import config_flag


def main(argv: Sequence[str]) -> None:
    """Train the diffusion decoder that turns visual tokens into pixels."""
    config_flag(argv)  # before the imports below, which take seconds
    from metamorph.flags.recipes import parse_arguments
    from metamorph.visualizer_training.arguments import VisualizerArguments

    (arguments,) = parse_arguments([VisualizerArguments], argv, prog="metamorph train-visualizer")
    from metamorph.runs.preemption import stops_quietly
    from metamorph.visualizer_training.run import train_visualizer  # after the arguments are known to be good

    with stops_quietly():
        result = train_visualizer(arguments)
    if result.is_main_process:
        print(f"visualizer finished after {result.seconds:.0f} s: {result.output_dir}")
