"""The conditions under which mini-sd itself would draw given pictures, for `train-visualizer --alignment_conditions`.

Stable Diffusion was pretrained on texts, mini-sd on the attributes of scenes. For pictures whose attributes are known,
mini-sd's own conditions exist, and fitting the projector to them first takes seconds, where finding them through the
frozen UNet alone takes many minutes of denoising. The attributes are read off the pictures by the pixel checker.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from metamorph.files.permissions import save_file
from metamorph.miniature.world.cells import ATTRIBUTES, GRID, cell_labels
from metamorph.miniature.world.checker import read_image
from metamorph.miniature.world.scenes import BACKGROUNDS, Scene
from metamorph.runs.progress import Progress
from metamorph.visualizer_training.images.sources import TrainingImages, open_images


ENCODER_FILE = "condition_encoder.safetensors"
CONDITION_DIM = 128


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
    images = open_images(image_folder=pictures)
    indices = Progress(range(len(images)), "reading scenes", unit="image", delay=2)
    scenes = [_read_scene(images, index) for index in indices]
    _, _, condition_encoder = load_asset(mini_sd)
    with torch.no_grad():
        conditions = condition_encoder.encode(scenes)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({"conditions": conditions.contiguous()}, file)
    return file


def _read_scene(images: TrainingImages, index: int) -> Scene:
    scene = read_image(images.load(index)).scene
    if scene is None:
        raise ValueError(f"{images.files[index]} shows no scene of the miniature world: its objects cannot be read")
    return scene


def load_asset(folder: Path) -> tuple[AutoencoderKL, UNet2DConditionModel, AttributeEncoder]:
    """Load mini-sd in float32: VAE, UNet, and the encoder of the attributes that the UNet was trained on."""
    encoder = AttributeEncoder()
    encoder.load_state_dict(load_file(folder / ENCODER_FILE))
    vae = AutoencoderKL.from_pretrained(folder / "vae").float()
    unet = UNet2DConditionModel.from_pretrained(folder / "unet").float()
    return vae.eval(), unet.eval(), encoder.eval()


class AttributeEncoder(nn.Module):
    """A scene's attributes as condition tokens; stands where Stable Diffusion has its text encoder.

    The token of a cell is the normalised sum of learned embeddings of what stands in the cell (shape or nothing,
    colour, size, position), of the background and of the cell itself.
    """

    def __init__(self, dim: int = CONDITION_DIM) -> None:
        super().__init__()
        self.attributes = nn.ModuleList(nn.Embedding(len(words) + 1, dim) for words in ATTRIBUTES.values())
        self.background = nn.Embedding(len(BACKGROUNDS), dim)
        self.cell = nn.Embedding(GRID * GRID, dim)

    def forward(self, labels: Tensor, backgrounds: Tensor) -> Tensor:
        """Conditions, not padded.

        Args:
            labels: classes of the object in each cell, ``[scenes, 16, attributes]``, 0 for none.
            backgrounds: index into ``BACKGROUNDS``, ``[scenes]``.

        Returns:
            ``[scenes, 16, dim]``, each token of mean 0 and variance 1.
        """
        tokens = self.cell.weight[None] + self.background(backgrounds)[:, None]
        for index, table in enumerate(self.attributes):
            tokens = tokens + table(labels[:, :, index])
        return F.layer_norm(tokens, tokens.shape[-1:])

    def encode(self, scenes: Sequence[Scene]) -> Tensor:
        """Conditions of scenes, ``[scenes, 16, dim]``."""
        return self(cell_labels(scenes), background_labels(scenes))


def background_labels(scenes: Sequence[Scene]) -> Tensor:
    """Index of every scene's background, ``[scenes]``."""
    return torch.tensor([BACKGROUNDS.index(scene.background) for scene in scenes])
