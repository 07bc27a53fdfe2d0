"""The square-root rule of the training guide: a learning rate for another number of samples in a step."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING


if TYPE_CHECKING:  # `metamorph lr` needs neither, and they take seconds to import
    from metamorph.data.batching.packing import BatchPlanner
    from metamorph.training.arguments.training import MetaMorphTrainingArguments


logger = logging.getLogger(__name__)


def scale_learning_rate(base_lr: float, base_batch: float, batch: float) -> float:
    """Learning rate for another global batch size: `base_lr * sqrt(batch / base_batch)`.

    Args:
        base_lr: Learning rate known to work at `base_batch`.
        base_batch: Samples per optimizer step it was tuned for.
        batch: Samples per optimizer step of the new run.

    Raises:
        ValueError: for a value that is not larger than 0.
    """
    for name, value in (("base learning rate", base_lr), ("base batch size", base_batch), ("batch size", batch)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"the {name} {value} must be a finite number larger than 0")
    return base_lr * math.sqrt(batch / base_batch)


def samples_in_a_step(planner: BatchPlanner, gradient_accumulation_steps: int) -> float:
    """Samples of one optimizer step, on average over an epoch: rows of all processes × samples in a row.

    Args:
        planner: Plans the run's batches.
        gradient_accumulation_steps: Micro-batches of a step.
    """
    rows = planner.rows_per_batch * planner.world_size * gradient_accumulation_steps
    return rows * len(planner.lengths) / max(planner.num_rows, 1)


def apply_learning_rate_rule(args: MetaMorphTrainingArguments, samples: float) -> str | None:
    """Replace `--learning_rate auto` by the rule's value, and say so in the log.

    Rates of single modules (`--mm_projector_lr`, …) stay as they are given.

    Args:
        args: How the run learns; `learning_rate` becomes a number.
        samples: Samples in an optimizer step.

    Returns:
        What was done, in one line; None if the rate is given as a number.
    """
    if not isinstance(args.learning_rate, str):  # the flags allow no other word than "auto"
        return None
    base, base_batch = args.base_learning_rate, args.base_batch_size
    assert base is not None  # checked with the flags
    assert base_batch is not None
    args.learning_rate = scale_learning_rate(base, base_batch, samples)
    done = (
        f"learning rate {args.learning_rate:.3g} = {base:g} × √({samples:.6g} / {base_batch}): --learning_rate auto "
        "from --base_learning_rate, for the samples in a step and --base_batch_size"
    )
    logger.info("%s", done)
    return done
