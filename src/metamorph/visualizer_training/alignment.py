"""A quick start for the projector: fit it to conditions that the diffusion model already understands.

Training through a frozen UNet is slow at first, because a UNet cannot use conditions unlike those it knows. Where the
right conditions of the images are known (from the diffusion model's own condition encoder), regression to them takes
the projector most of the way without running the UNet.
"""

import logging
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.nn import functional as F

from metamorph.files.model_files import check_finite
from metamorph.runs.progress import Progress
from metamorph.visualization.projector import VisualizationProjector


logger = logging.getLogger(__name__)

BATCH_SIZE = 64
_KEY = "conditions"


def load_conditions(file: str | Path, num_images: int) -> torch.Tensor:
    """Read the tensor `conditions` `[num_images, tokens, cross_attention_dim]` of a safetensors file, in float32."""
    try:
        conditions = load_file(Path(file).expanduser()).get(_KEY)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"--alignment_conditions {file} cannot be read: {error}") from error
    if conditions is None or conditions.dim() != 3 or len(conditions) != num_images:
        found = "nothing" if conditions is None else list(conditions.shape)
        raise ValueError(
            f"--alignment_conditions {file} must hold a tensor {_KEY!r} [{num_images} images, tokens, features] in "
            f"the order of the images; it holds {found}"
        )
    check_finite([(_KEY, conditions)], f"--alignment_conditions {file}")
    return conditions.float()


def align_projector(
    projector: VisualizationProjector,
    visual_tokens: torch.Tensor,
    conditions: torch.Tensor,
    *,
    steps: int,
    lr: float,
    seed: int,
) -> None:
    """Fit the projector in place by mean squared error, with AdamW and a cosine schedule to 0, in batches of 64 images.

    Args:
        visual_tokens: `[images, N, D]`, on the CPU.
        conditions: `[images, N', cross_attention_dim]`, on the CPU: the targets.
    """
    device = next(projector.parameters()).device
    with torch.no_grad():
        shape = projector(visual_tokens[:1].to(device)).shape[1:]
    if shape != conditions.shape[1:]:
        raise ValueError(
            f"--alignment_conditions have shape {list(conditions.shape[1:])} per image, but the projector gives "
            f"{list(shape)}; choose --mode and --num_query_tokens to match"
        )
    optimizer = torch.optim.AdamW(projector.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in Progress(range(steps), "aligning projector", unit="step"):
        batch = torch.randint(len(visual_tokens), (BATCH_SIZE,), generator=generator)
        loss = F.mse_loss(projector(visual_tokens[batch].to(device)), conditions[batch].to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    optimizer.zero_grad(set_to_none=True)
    logger.info("Aligned the projector with known conditions: MSE %.4f after %d steps", loss.item(), steps)
