"""The conditions under which mini-sd itself would draw given pictures, for `train-visualizer --alignment_conditions`.

Stable Diffusion was pretrained on texts, mini-sd on the attributes of scenes. For pictures whose attributes are known,
mini-sd's own conditions exist, and fitting the projector to them first takes seconds, where finding them through the
frozen UNet alone takes many minutes of denoising. The attributes are read off the pictures by the pixel checker.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from tools.miniature.build_sd import load_asset

from metamorph.miniature.world.checker import read_image
from metamorph.miniature.world.scenes import Scene
from metamorph.visualizer_training.pictures.sources import ImageFiles


def write_conditions(pictures: Path, mini_sd: Path, file: Path) -> Path:
    """Write the conditions of all pictures of a folder, in the order in which the visualizer reads them.

    Args:
        pictures: Folder of pictures of the miniature world, drawn exactly.
        mini_sd: The asset.
        file: Gets the tensor `conditions`, [pictures, 16, cross_attention_dim].

    Returns:
        `file`.

    Raises:
        ValueError: if a picture is not one of the miniature world; the message names it.
    """
    files = ImageFiles.from_folder(pictures)
    scenes = [_read_scene(files, index) for index in range(len(files))]
    _, _, condition_encoder = load_asset(mini_sd)
    with torch.no_grad():
        conditions = condition_encoder.encode(scenes)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({"conditions": conditions.contiguous()}, file)
    return file


def _read_scene(files: ImageFiles, index: int) -> Scene:
    scene = read_image(files.load(index)).scene
    if scene is None:
        raise ValueError(f"{files.paths[index]} shows no scene of the miniature world: its objects cannot be read")
    return scene
