"""Deterministic algorithms during training, so that the same seed gives bit-identical weights."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import enable_full_determinism


@contextmanager
def deterministic_algorithms(device: torch.device, *, full: bool = False, seed: int = 0) -> Iterator[None]:
    """Use deterministic algorithms of PyTorch within: always on a CPU, on other devices with `full`.

    Otherwise the order of some sums depends on which thread is faster. Results may still differ with the number of
    threads or processes, the machine, and versions. All settings are restored afterwards.
    With `full` (`--full_determinism`), an operation without a deterministic algorithm is an error rather than a
    warning, and all generators are seeded, as Transformers' Trainer does.
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
            options.fill_uninitialized_memory = False  # a debugging aid that writes to every `torch.empty`
        yield
    finally:
        torch.use_deterministic_algorithms(algorithms[0], warn_only=algorithms[1])
        options.fill_uninitialized_memory = fills
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
        for name in changed:
            os.environ.pop(name, None)
            if name in environment:
                os.environ[name] = environment[name]
