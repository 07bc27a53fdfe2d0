"""Which process of a run this one is, as launchers say it: known before PyTorch is imported."""

import os


def is_first_process() -> bool:
    """Whether this is the only process, or the first of those that a launcher has started: the one that reports."""
    return int(os.environ.get("RANK", "0")) == 0
