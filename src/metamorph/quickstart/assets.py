"""Old import path of `metamorph.mini`, kept for one release."""

import warnings

from metamorph.mini import asset_path, shipped_folder, verify_asset


__all__ = ["asset_path", "shipped_folder", "verify_asset"]

warnings.warn(
    "metamorph.quickstart.assets has moved to metamorph.mini",
    DeprecationWarning,
    stacklevel=2,
)
