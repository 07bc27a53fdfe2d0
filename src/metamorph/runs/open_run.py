"""What surrounds every run: the lock of its output folder, the handlers of signals, deterministic algorithms."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import TrainingArguments

from metamorph.runs.checkpoint_files import clean_up
from metamorph.runs.determinism import deterministic_algorithms
from metamorph.runs.lock import only_run_in
from metamorph.runs.preemption import Preemption, clear_marker


@contextmanager
def open_run(args: TrainingArguments) -> Iterator[Preemption]:
    """Lock the output folder, catch signals and make algorithms deterministic if necessary; undone at the end."""
    assert args.output_dir is not None
    deterministic = deterministic_algorithms(args.device, full=args.full_determinism, seed=args.seed)
    with Preemption(args.ddp_timeout_delta) as preemption, only_run_in(args.output_dir), deterministic:
        if args.process_index == 0:
            clear_marker(args.output_dir)
        if args.should_save:  # with --save_on_each_node one process of each machine
            clean_up(args.output_dir)
        yield preemption
