"""The pretrained miniatures that ship with the package, and how they are checked.

As the real system starts from pretrained SigLIP, Llama and Stable Diffusion, the quickstart starts from three
small models of the same classes. Each is an ordinary Hugging Face folder of bf16 safetensors with a model card
that names its recipe, figures and hashes. `mini` is built from them: a trained MetaMorph model and its
visualizer. `cards.py` verifies the cards; `tools/miniature` in a checkout builds all of it again.
"""

from __future__ import annotations

from pathlib import Path

from metamorph.mini.cards import AssetCard, AssetError, verify_folder


PARTS = ("mini-siglip", "mini-llama", "mini-sd")
"""The small pretrained models that the quickstart starts from."""
ASSETS = (*PARTS, "mini")
"""The shipped assets, in the order in which they are built."""


__all__ = ["ASSETS", "PARTS", "AssetCard", "AssetError", "asset_path", "full_name", "shipped_folder", "verify_asset"]


def asset_path(name: str) -> Path:
    """Folder of a shipped asset, for `from_pretrained`.

    Args:
        name: `mini-siglip`, `mini-llama`, `mini-sd` or `mini`; the prefix `mini-` may be left out.

    Raises:
        ValueError: There is no asset of this name.
        AssetError: The package was installed without it.
    """
    folder = Path(__file__).parent / full_name(name)
    if not folder.is_dir():
        raise AssetError(f"{folder.name} is not in {folder.parent}: install the package again")
    return folder


def shipped_folder(reference: str, part: str) -> str:
    """The folder that the name of a shipped model means where a flag takes a folder; anything else stays as it is.

    Args:
        reference: Value of the flag. A local file or folder of that name goes before the shipped one.
        part: What the flag asks for, which decides what `mini` means: `model`, `visualizer` or `tower`.

    Raises:
        AssetError: The package was installed without the asset.
    """
    if reference not in ASSETS or Path(reference).exists():
        return reference
    if reference != "mini":
        return str(asset_path(reference))
    # The tower of mini was frozen: it is mini-siglip.
    return str(asset_path("mini-siglip") if part == "tower" else asset_path(reference) / part)


def verify_asset(name: str) -> AssetCard:
    """Check that a shipped asset is the one that its card describes, file by file.

    Args:
        name: As for :func:`asset_path`.

    Returns:
        The card, with recipe, figures and gates.

    Raises:
        ValueError: There is no asset of this name.
        AssetError: A file is missing or changed; the message names it.
    """
    return verify_folder(asset_path(name))


def full_name(name: str) -> str:
    """`mini-siglip` for `siglip`, and so on.

    Raises:
        ValueError: There is no asset of this name.
    """
    found = name if name in ASSETS else f"mini-{name}"
    if found not in ASSETS:
        raise ValueError(f"there is no asset {name!r}: choose among {', '.join(ASSETS)}")
    return found
