"""`metamorph train-visualizer --config recipe.yaml [--flag value …]`."""

from collections.abc import Sequence

from metamorph.recipes import config_flag


def main(argv: Sequence[str]) -> None:
    """Train the diffusion decoder that turns visual tokens into pixels.

    Args:
        argv: Command line after `train-visualizer`.
    """
    config_flag(argv)  # at once; the imports below take seconds
    from metamorph.flags.recipes import parse_arguments
    from metamorph.visualizer_training.arguments import VisualizerArguments

    (arguments,) = parse_arguments([VisualizerArguments], argv, prog="metamorph train-visualizer")
    from metamorph.runs.preemption import SIGNALS, Preempted, ignore_signals
    from metamorph.visualizer_training.run import train_visualizer  # after the arguments are known to be good

    try:
        result = train_visualizer(arguments)
    except Preempted:
        # torchrun ends the others with SIGTERM once one is gone: let trackers finish their uploads.
        ignore_signals(numbers=SIGNALS)
        raise
    if result.is_main_process:
        print(f"visualizer finished after {result.seconds:.0f} s: {result.output_dir}")
