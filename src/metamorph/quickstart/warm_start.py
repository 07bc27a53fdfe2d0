"""A first guess of the visualizer's projector: imitate the conditions that mini-sd was pretrained on.

Stable Diffusion was pretrained on texts, mini-sd on the attributes of scenes. For pictures whose attributes are known,
both the tower's tokens and mini-sd's own condition exist, so that a map from one to the other is found by regression
within seconds, without a denoising step. `metamorph train-visualizer --pretrained_projector` goes on from there.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from metamorph.quickstart.assets.build_sd import load_asset
from metamorph.quickstart.recipe import NUM_IMAGE_TOKENS
from metamorph.quickstart.render import render
from metamorph.quickstart.scenes import Scene, sample_scene
from metamorph.visualization.arguments import VisualizerArguments
from metamorph.visualization.parts import build_projector, load_tower
from metamorph.visualization.schedule import build_lr_scheduler


logger = logging.getLogger(__name__)

BATCH_SIZE = 64
PEAK_LR = 4e-3
_STREAM = 40


def imitate_conditions(args: VisualizerArguments, folder: Path, *, scenes: int, steps: int) -> float:
    """Fit a projector to mini-sd's own conditions and write it.

    Args:
        args: Flags of the visualizer that will start from the projector; mini-sd and the tower are read from them.
        folder: Where the projector is written.
        scenes: Number of training scenes.
        steps: Optimizer steps.

    Returns:
        Mean squared error over the scenes; the conditions have variance 1.
    """
    rng = np.random.default_rng([args.seed, _STREAM])
    drawn = [sample_scene(rng) for _ in range(scenes)]
    tokens = _encode(args, drawn)
    _, unet, condition_encoder = load_asset(Path(args.pretrained_model_name_or_path))
    with torch.no_grad():
        targets = condition_encoder.encode(drawn)
    torch.manual_seed(args.seed)
    projector = build_projector(args, (tokens.shape[1], tokens.shape[2]), unet.config.cross_attention_dim)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=PEAK_LR, weight_decay=0.0)
    schedule = build_lr_scheduler("cosine", optimizer, warmup_steps=steps // 10, training_steps=steps)
    for _ in range(steps):
        chosen = torch.randint(scenes, (BATCH_SIZE,))
        F.mse_loss(projector(tokens[chosen]), targets[chosen]).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    projector.eval().save_pretrained(folder)
    with torch.no_grad():
        error = F.mse_loss(projector(tokens), targets).item()
    logger.info("the projector imitates mini-sd's conditions with an error of %.3f", error)
    return error


@torch.no_grad()
def _encode(args: VisualizerArguments, scenes: Sequence[Scene]) -> Tensor:
    """The tower's tokens of scenes, `[scenes, N, D]`."""
    tower, pixel_format = load_tower(args)
    chunks = []
    for start in range(0, len(scenes), 2 * BATCH_SIZE):
        pictures = [pixel_format.pixels(render(scene)) for scene in scenes[start : start + 2 * BATCH_SIZE]]
        chunks.append(tower(torch.stack(pictures)))
    tokens = torch.cat(chunks)
    if tokens.shape[1] != NUM_IMAGE_TOKENS:
        raise ValueError(f"mini-sd has a condition for {NUM_IMAGE_TOKENS} visual tokens, not for {tokens.shape[1]}")
    return tokens
