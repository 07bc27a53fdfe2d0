"""The conditions with which mini-sd itself would draw given images, for `train-visualizer --alignment_conditions`.

Stable Diffusion was pretrained on texts, mini-sd on the attributes of scenes. The pixel checker reads these attributes
from the images, which gives mini-sd's own conditions. Fitting the projector to them takes seconds; through the frozen
UNet it would take many minutes of denoising.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from metamorph.files.permissions import save_file
from metamorph.miniature.world.cells import GRID, cell_labels
from metamorph.miniature.world.checker import read_image
from metamorph.miniature.world.scenes import ATTRIBUTES, BACKGROUNDS, Scene
from metamorph.runs.progress import Progress
from metamorph.visualizer_training.images.sources import open_images


ENCODER_FILE = "condition_encoder.safetensors"
CONDITION_DIM = 128


def write_conditions(folder: Path, mini_sd: Path, file: Path) -> None:
    """Write `conditions [images, 16, dim]` of a folder of images without jitter, in the visualizer's order."""
    images = open_images(image_folder=folder)
    scenes = []
    for index in Progress(range(len(images)), "reading scenes", unit="image", delay=2):
        scene = read_image(images.load(index)).scene
        if scene is None:
            raise ValueError(f"{images.files[index]} shows no scene of the miniature world: its objects cannot be read")
        scenes.append(scene)
    encoder = AttributeEncoder()
    encoder.load_state_dict(load_file(mini_sd / ENCODER_FILE))
    with torch.no_grad():
        conditions = encoder.encode(scenes)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({"conditions": conditions.contiguous()}, file)


class AttributeEncoder(nn.Module):
    """Encodes a scene's attributes as condition tokens, as Stable Diffusion's text encoder does texts.

    The token of a cell is the normalised sum of learned embeddings of its content (shape or nothing, colour, size,
    position), of the background and of the cell itself.
    """

    def __init__(self, dim: int = CONDITION_DIM) -> None:
        super().__init__()
        self.attributes = nn.ModuleList(nn.Embedding(len(words) + 1, dim) for words in ATTRIBUTES.values())
        self.background = nn.Embedding(len(BACKGROUNDS), dim)
        self.cell = nn.Embedding(GRID * GRID, dim)

    def forward(self, labels: Tensor, backgrounds: Tensor) -> Tensor:
        """Tokens `[scenes, 16, dim]` of `cell_labels` `[scenes, 16, attributes]` and `background_labels` `[scenes]`."""
        tokens = self.cell.weight[None] + self.background(backgrounds)[:, None]
        for index, table in enumerate(self.attributes):
            tokens = tokens + table(labels[:, :, index])
        return F.layer_norm(tokens, tokens.shape[-1:])

    def encode(self, scenes: Sequence[Scene]) -> Tensor:
        """Conditions of scenes, `[scenes, 16, dim]`."""
        return self(cell_labels(scenes), background_labels(scenes))


def background_labels(scenes: Sequence[Scene]) -> Tensor:
    """Index of every scene's background, `[scenes]`."""
    return torch.tensor([BACKGROUNDS.index(scene.background) for scene in scenes])
