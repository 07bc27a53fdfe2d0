"""Deterministic algorithms while a run trains, so that the same seed gives the same weights bit for bit."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import enable_full_determinism


@contextmanager
def deterministic_algorithms(device: torch.device, *, full: bool = False, seed: int = 0) -> Iterator[None]:
    """Within, PyTorch takes deterministic algorithms: always on a CPU, elsewhere with `full`.

    Otherwise some sums depend on which thread is faster. Another number of threads or processes, another machine or
    version may still round differently. Everything that is changed is restored afterwards.

    Args:
        device: Where the run computes.
        full: `--full_determinism`: on any device, and an operation that has no deterministic algorithm is an error. On
            a CPU without it, such an operation is a warning.
        seed: Seeds all generators with `full`, as Transformers' Trainer does.
    """
    algorithms = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    options: Any = torch.utils.deterministic  # a property of the module, which type checkers do not see
    fills = options.fill_uninitialized_memory
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    environment = dict(os.environ)
    changed: set[str] = set()
    try:
        if full:
            enable_full_determinism(seed)
            changed = {name for name, value in os.environ.items() if environment.get(name) != value}
        elif device.type == "cpu" and not algorithms[0]:
            torch.use_deterministic_algorithms(True, warn_only=True)
            # By default every `torch.empty` is written to. That finds code that reads what nobody wrote; ours does not.
            options.fill_uninitialized_memory = False
        yield
    finally:
        torch.use_deterministic_algorithms(algorithms[0], warn_only=algorithms[1])
        options.fill_uninitialized_memory = fills
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
        for name in changed:
            if name in environment:
                os.environ[name] = environment[name]
            else:
                os.environ.pop(name, None)
