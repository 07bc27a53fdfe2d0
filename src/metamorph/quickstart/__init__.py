"""Old import path of `metamorph.miniature` and `metamorph.mini`, kept for one release."""

import warnings


def warn_of_move(old: str, new: str) -> None:
    """Warn the module that imports `old`."""
    warnings.warn(f"{old} has moved to {new}", DeprecationWarning, stacklevel=3)


warn_of_move(__name__, "metamorph.miniature, its assets to metamorph.mini")
