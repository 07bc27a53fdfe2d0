"""`metamorph train --config recipe.yaml [--flag value …]`."""

from collections.abc import Sequence


def main(argv: Sequence[str]) -> None:
    """Train stage 1 or stage 2.

    Args:
        argv: Command line after `train`.
    """
    from metamorph.training.arguments import DataArguments, MetaMorphTrainingArguments, ModelArguments
    from metamorph.training.parsing import parse_arguments

    types = (ModelArguments, DataArguments, MetaMorphTrainingArguments)
    arguments = parse_arguments(types, argv, prog="metamorph train")
    from metamorph.preemption import Preempted, ignore_signals
    from metamorph.training.run import run_training  # after the arguments are known to be good: takes seconds
    from metamorph.visualization.drawing import open_visualizer

    try:
        result = run_training(*arguments, open_visualizer=open_visualizer)
    except Preempted:
        ignore_signals()  # torchrun ends the others with SIGTERM once one is gone: let trackers finish their uploads
        raise
    if result.is_main_process:
        print(f"stage {result.stage} finished after {result.global_step} steps: {result.output_dir}")
