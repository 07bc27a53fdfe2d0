"""The rank of this process, from the launcher's environment: known before PyTorch is imported."""

import os


def rank() -> int:
    """The number of this process among all of its launcher; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """The number of processes of the launcher; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_process() -> bool:
    """Whether this is the only process, or rank 0 of a launcher: the one that reports."""
    return rank() == 0
