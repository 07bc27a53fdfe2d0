"""Old import path of `metamorph.miniature.quickstart.run`, kept for one release."""

import warnings

from metamorph.miniature.quickstart.run import run_quickstart


__all__ = ["run_quickstart"]

warnings.warn(
    "metamorph.quickstart.run has moved to metamorph.miniature.quickstart.run",
    DeprecationWarning,
    stacklevel=2,
)
