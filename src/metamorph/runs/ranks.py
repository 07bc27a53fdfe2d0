"""The rank of this process, from the launcher's environment: known before PyTorch is imported."""

import os


def is_first_process() -> bool:
    """Whether this is the only process, or rank 0 of a launcher: the one that reports."""
    return int(os.environ.get("RANK", "0")) == 0
