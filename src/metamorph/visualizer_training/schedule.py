"""Learning rate of the visualizer: logarithmic warm-up, then linear decay to zero at the last step.

The original warms up over 4,000 of 16,000 steps, a fixed horizon; here it is `training_steps`. The other schedules are
Transformers'.
"""

import math


DEFAULT_LR_SCHEDULER = "log_warmup_linear_decay"
LR_SCHEDULERS = (DEFAULT_LR_SCHEDULER, "constant", "constant_with_warmup", "linear", "cosine")


def log_warmup_linear_decay(step: int, warmup_steps: int, training_steps: int) -> float:
    """Factor of the peak learning rate at optimizer step `step`, counted from 0.

    Warm-up: `log(1 + step) / log(1 + warmup_steps)`, so the rate rises fast at first. Decay: from 1 at
    `warmup_steps` linearly to 0 at `training_steps`.
    """
    if step < warmup_steps:
        return math.log1p(step) / math.log1p(warmup_steps)
    if training_steps <= warmup_steps:
        return 1.0
    return max(0.0, (training_steps - step) / (training_steps - warmup_steps))
