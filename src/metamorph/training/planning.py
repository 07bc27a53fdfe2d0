"""Which samples make which batch: lengths are measured once on each machine, then planned."""

import logging
import os

from metamorph.data.batching.lengths import Lengths, Measurable, measure
from metamorph.data.batching.packing import BatchPlanner
from metamorph.data.sources.index import cache_folder
from metamorph.training.arguments.training import MetaMorphTrainingArguments


logger = logging.getLogger(__name__)

MAX_MEASURING = 32
"""Most processes that measure lengths where no number of workers is asked for."""


def plan_run(dataset: Measurable, model_max_length: int, args: MetaMorphTrainingArguments) -> BatchPlanner:
    """Decide which samples make which batch, from lengths that are measured now if anything depends on them.

    One process of each machine measures, with workers of its own, and the others read what it has kept.

    Args:
        dataset: The data set.
        model_max_length: Tokens of a row.
        args: How the run learns.
    """
    group_by_length = args.train_sampling_strategy == "group_by_length"
    if args.packing or group_by_length:
        with args.main_process_first(desc="measuring lengths"):
            lengths = measure(dataset, measuring_workers(args), cache_folder())
    else:
        lengths = Lengths.unknown(len(dataset))
    planner = BatchPlanner(
        lengths,
        seed=args.seed if args.data_seed is None else args.data_seed,
        world_size=args.world_size,
        rows_per_batch=args.per_device_train_batch_size,
        max_length=model_max_length,
        packing=args.packing,
        group_by_length=group_by_length,
        shuffle=args.train_sampling_strategy != "sequential",
    )
    if args.packing:
        per_row = len(dataset) / planner.num_rows
        logger.info(
            "packing: %d samples in %d rows of %d tokens, %.1f %% full; %d steps of micro-batches an epoch, on average "
            "%.1f samples a row and %.0f in each optimizer step",
            len(dataset),
            planner.num_rows,
            model_max_length,
            100 * planner.efficiency,
            planner.steps,
            per_row,
            per_row * args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps,
        )
    return planner


def measuring_workers(args: MetaMorphTrainingArguments) -> int:
    """Processes that measure lengths: as many as all data loaders of this machine will have, else one for each core.

    One process alone takes hours for ten million samples, and the other ranks wait for `--ddp_timeout` only.

    Args:
        args: How the run learns.
    """
    asked = args.dataloader_num_workers * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    # Of a shared machine the cores that are ours, where the system tells.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return asked or min(cores, MAX_MEASURING)
