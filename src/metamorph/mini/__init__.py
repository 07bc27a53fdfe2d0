"""The small pretrained models that ship with the package.

`mini-siglip`, `mini-llama` and `mini-sd` are of the classes of SigLIP, Llama and Stable Diffusion, from which the real
system starts. `mini` is built from them: a trained MetaMorph model and its visualizer. Each is an ordinary Hugging Face
folder of bf16 safetensors with a model card that states its recipe, figures and hashes. `tools/miniature` in a checkout
builds everything from scratch and verifies the cards.
"""

from __future__ import annotations

from pathlib import Path


PARTS = ("mini-siglip", "mini-llama", "mini-sd")
"""What the quickstart starts from."""
ASSETS = (*PARTS, "mini")
"""All shipped models, in the order in which they are built."""


class AssetError(ValueError):
    """A shipped asset is missing, incomplete or not the one that its card describes."""


def asset_path(name: str) -> Path:
    """Folder of a shipped model, for `from_pretrained`; an `AssetError` if the package was installed without it."""
    if name not in ASSETS:
        raise ValueError(f"there is no asset {name!r}: choose among {', '.join(ASSETS)}")
    folder = Path(__file__).parent / name
    if not folder.is_dir():
        raise AssetError(f"{folder.name} is not in {folder.parent}: install the package again")
    return folder


def shipped_folder(reference: str, part: str) -> str:
    """The folder of a shipped model if `reference` is its name and no local file or folder; else `reference`.

    `part` is what a flag asks for, which decides what `mini` means: `model`, `visualizer` or `tower`.
    """
    if reference not in ASSETS or Path(reference).exists():
        return reference
    if reference != "mini":
        return str(asset_path(reference))
    # The tower of mini was frozen: it is mini-siglip.
    return str(asset_path("mini-siglip") if part == "tower" else asset_path(reference) / part)
