"""Learning rate of the visualizer: logarithmic warm-up, then linear decay to zero at the last step.

The original warms up over 4,000 of 16,000 steps. There the horizon was fixed; here it is `training_steps`.
"""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import get_scheduler


DEFAULT_LR_SCHEDULER = "log_warmup_linear_decay"
LR_SCHEDULERS = (DEFAULT_LR_SCHEDULER, "constant", "constant_with_warmup", "linear", "cosine")


def log_warmup_linear_decay(step: int, warmup_steps: int, training_steps: int) -> float:
    """Factor of the peak learning rate at optimizer step `step`, counted from 0.

    Warm-up: `log(1 + step) / log(1 + warmup_steps)`, so the rate rises fast at first. Decay: from 1 at
    `warmup_steps` straight to 0 at `training_steps`.
    """
    if step < warmup_steps:
        return math.log1p(step) / math.log1p(warmup_steps)
    if training_steps <= warmup_steps:
        return 1.0
    return max(0.0, (training_steps - step) / (training_steps - warmup_steps))


def build_lr_scheduler(name: str, optimizer: Optimizer, *, warmup_steps: int, training_steps: int) -> LRScheduler:
    """The schedule `name` for `optimizer`, in optimizer steps.

    Args:
        name: One of `LR_SCHEDULERS`; all but the first are those of Transformers.
        optimizer: Its learning rate is the peak.
        warmup_steps: Length of the warm-up.
        training_steps: Horizon of the decay.

    Raises:
        ValueError: If the name is unknown.
    """
    if name not in LR_SCHEDULERS:
        raise ValueError(f"lr_scheduler={name!r} is unknown; --lr_scheduler takes one of {', '.join(LR_SCHEDULERS)}.")
    if name == DEFAULT_LR_SCHEDULER:
        return LambdaLR(optimizer, lambda step: log_warmup_linear_decay(step, warmup_steps, training_steps))
    return get_scheduler(name, optimizer, num_warmup_steps=warmup_steps, num_training_steps=training_steps)
