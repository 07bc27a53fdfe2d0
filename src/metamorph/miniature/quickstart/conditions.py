"""A projector to start from, fitted to the conditions with which mini-sd itself would draw the training images.

Stable Diffusion was pretrained on texts, mini-sd on the attributes of scenes. The pixel checker reads these attributes
from the images, which gives mini-sd's own conditions. Fitting the projector to them takes seconds; through the frozen
UNet it would take many minutes of denoising.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import set_seed

from metamorph.files.permissions import apply_umask
from metamorph.miniature.world.cells import GRID, cell_labels
from metamorph.miniature.world.checker import read_image
from metamorph.miniature.world.scenes import ATTRIBUTES, BACKGROUNDS, Scene
from metamorph.runs.progress import Progress
from metamorph.visualization.token_options import load_encoder
from metamorph.visualizer_training.arguments import VisualizerArguments
from metamorph.visualizer_training.build import build_projector
from metamorph.visualizer_training.images.sources import open_images


logger = logging.getLogger(__name__)

ENCODER_FILE = "condition_encoder.safetensors"
CONDITION_DIM = 128
_BATCH_SIZE = 64
_LEARNING_RATE = 4e-3


def fit_projector(args: VisualizerArguments, steps: int) -> None:
    """Fit the projector of a run to mini-sd's conditions of its images, and write it to `args.pretrained_projector`."""
    source = open_images(image_folder=args.image_folder)
    images = [source.load(index) for index in range(len(source))]
    scenes = []
    for file, image in zip(source.files, Progress(images, "reading scenes", unit="image", delay=2), strict=True):
        scene = read_image(image).scene
        if scene is None:
            raise ValueError(f"{file} shows no scene of the miniature world: its objects cannot be read")
        scenes.append(scene)
    teacher = AttributeEncoder()
    teacher.load_state_dict(load_file(Path(args.pretrained_model_name_or_path) / ENCODER_FILE))
    with torch.no_grad():
        conditions = teacher.encode(scenes)  # (images, 16, dim)
    encoder = load_encoder(args).to(args.device)
    visual_tokens = encoder.encode_images(images, args.batch_size)  # (images, 16, features)
    set_seed(args.seed)
    tokens = (encoder.config.num_image_tokens, encoder.num_features)
    projector = build_projector(replace(args, pretrained_projector=None), tokens, CONDITION_DIM).to(args.device)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=_LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(args.seed)
    for _ in Progress(range(steps), "aligning projector", unit="step"):
        batch = torch.randint(len(images), (_BATCH_SIZE,), generator=generator)
        loss = F.mse_loss(projector(visual_tokens[batch]), conditions[batch].to(args.device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    logger.info("Aligned the projector with known conditions: MSE %.4f after %d steps", loss.item(), steps)
    folder = Path(str(args.pretrained_projector))
    projector.save_pretrained(folder)
    apply_umask(*folder.glob("*.safetensors"))


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
