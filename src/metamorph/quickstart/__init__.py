"""Old import path of `metamorph.miniature` and `metamorph.mini`, kept for one release."""

import warnings


warnings.warn(
    "metamorph.quickstart has moved to metamorph.miniature, its assets to metamorph.mini",
    DeprecationWarning,
    stacklevel=2,
)
