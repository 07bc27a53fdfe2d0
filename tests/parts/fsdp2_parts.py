"""What the processes of the FSDP2 tests, and the one process that they are compared with, have in common."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from metamorph.data.batching.collation import PaddedCollator
from metamorph.data.dataset import load_data
from metamorph.models.modeling_metamorph import MetaMorphForConditionalGeneration
from metamorph.training.arguments import ModelArguments
from metamorph.training.build import load_model, resolve_model
from metamorph.training.metrics import count_targets
from metamorph.training.stages import apply_stage


NUM_STEPS = 6


def build(model_args: ModelArguments) -> MetaMorphForConditionalGeneration:
    """The same model on every process, frozen as the stage asks."""
    torch.manual_seed(0)
    model = load_model(model_args, resolve_model(model_args))
    apply_stage(model, model_args)
    return model.train()


def train(
    model: torch.nn.Module, model_args: ModelArguments, parts: Path, rank: int = 0, world_size: int = 1
) -> list[torch.Tensor]:
    """A few steps on the batches of one rank; returns its share of the loss of each step."""
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    losses = []
    for batch, normalizers in rank_batches(model_args, parts, rank, world_size):
        loss = model(**batch, loss_normalizers=tuple(count / world_size for count in normalizers)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


def rank_batches(
    model_args: ModelArguments, parts: Path, rank: int, world_size: int
) -> Iterator[tuple[dict[str, Any], tuple[torch.Tensor, ...]]]:
    """The batches of one rank, each with the numbers of text and visual targets of all ranks in that step.

    A step has two samples: an image question and an image to draw, or an image edit and plain text. So with two
    ranks one of them has no answer image in every step, and every second step it has no image at all.
    """
    processor = resolve_model(model_args).processor
    data = load_data(str(parts / "data.jsonl"), processor, image_folder=str(parts / "images"), model_max_length=4096)
    collate = PaddedCollator(processor.pad_token_id)
    for step in range(NUM_STEPS):
        samples = [data[(2 * step + number) % len(data)] for number in range(2)]
        counts = sum(count_targets(collate([sample])) for sample in samples)
        yield collate(samples[rank::world_size]), tuple(counts.clamp(min=1).unbind())
