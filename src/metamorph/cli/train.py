"""`metamorph train --config recipe.yaml [--flag value …]`."""

from collections.abc import Sequence

from metamorph.recipes import config_flag
from metamorph.runs.ranks import is_first_process


def main(argv: Sequence[str]) -> None:
    """Train stage 1 or stage 2, or describe the run with `--dry-run`."""
    config_flag(argv)  # before the imports below, which take seconds
    from metamorph.flags.recipes import parse_arguments
    from metamorph.training.arguments import DataArguments, MetaMorphTrainingArguments, ModelArguments, RunArguments
    from metamorph.training.dry_run.arguments import DryRunArguments

    types = (ModelArguments, DataArguments, MetaMorphTrainingArguments, DryRunArguments)
    *arguments, dry_run = parse_arguments(types, argv, prog="metamorph train")
    if dry_run.dry_run:
        from metamorph.training.dry_run.preview import preview
        from metamorph.training.dry_run.report import format_dry_run

        if is_first_process():
            print(format_dry_run(preview(RunArguments(*arguments), dry_run)))
        return
    from metamorph.runs.preemption import stops_quietly
    from metamorph.training.run import run_training  # after the arguments are checked, because it takes seconds

    with stops_quietly():
        result = run_training(*arguments)
    if result.is_main_process:
        print(f"stage {result.stage} finished after {result.global_step} steps: {result.output_dir}")
