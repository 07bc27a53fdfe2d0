"""`metamorph train --config recipe.yaml [--flag value …]`."""

from collections.abc import Sequence
from typing import Any

from metamorph.recipes import config_flag
from metamorph.runs.ranks import is_first_process


def main(argv: Sequence[str]) -> None:
    """Train stage 1 or stage 2.

    Args:
        argv: Command line after `train`.
    """
    config_flag(argv)  # at once; the imports below take seconds
    from metamorph.training.dry_run.arguments import parse_training_flags

    model_args, data_args, training_args, dry_run = parse_training_flags(argv)
    if dry_run.dry_run:
        _print_plan(model_args, data_args, training_args, dry_run)
        return
    from metamorph.runs.preemption import SIGNALS, Preempted, ignore_signals
    from metamorph.training.run import run_training  # after the arguments are known to be good: takes seconds

    try:
        result = run_training(model_args, data_args, training_args)
    except Preempted:
        # torchrun ends the others with SIGTERM once one is gone: let trackers finish their uploads.
        ignore_signals(numbers=SIGNALS)
        raise
    if result.is_main_process:
        print(f"stage {result.stage} finished after {result.global_step} steps: {result.output_dir}")


def _print_plan(*arguments: Any) -> None:
    """What a run would do, once however many processes there are."""
    from metamorph.training.dry_run.preview import preview
    from metamorph.training.dry_run.report import format_dry_run

    if is_first_process():
        print(format_dry_run(preview(*arguments)))
