"""Old import path of `metamorph.mini`, kept for one release."""

import warnings

from metamorph.mini import ASSETS, PARTS, AssetCard, AssetError, asset_path, shipped_folder, verify_asset


__all__ = ["ASSETS", "PARTS", "AssetCard", "AssetError", "asset_path", "shipped_folder", "verify_asset"]

warnings.warn(
    "metamorph.quickstart.assets has moved to metamorph.mini",
    DeprecationWarning,
    stacklevel=2,
)
