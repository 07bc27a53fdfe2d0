"""Losses on data that is not trained on, for each source: exact means over its tokens, however ranks share them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from metamorph.data.batching.collation import PaddedCollator
from metamorph.data.dataset import MixtureDataset
from metamorph.models.batch_indices import first_image_starts
from metamorph.models.losses import constant_cosine_sum, sum_dtype
from metamorph.runs.preemption import ignore_signals
from metamorph.runs.progress import Progress


METRICS = (
    *("text_loss", "visual_loss", "visual_cosine", "visual_cosine_baseline", "image_start_accuracy"),
    *("num_text_tokens", "num_visual_tokens", "num_image_answers"),
)
"""What is logged of each source, beside `loss`."""
_NUM_SUMS = 7


@dataclass(frozen=True)
class SourceLoss:
    """What was measured on one source, or on all: sums over its tokens, and the means that are logged."""

    sums: Tensor
    """float64 [7] on the CPU: text loss, visual loss and cosine; the numbers of supervised text tokens and of visual
    target tokens; of answers with an image, those that the model begins, and all."""
    direction_sums: Tensor
    """float64 [N, D] on the CPU, see `metamorph.models.losses.direction_sums`."""

    @property
    def text_loss(self) -> float:
        """Cross-entropy per supervised text token, in nats; 0 if there are none."""
        return self.sums[0].item() / max(self.num_text_tokens, 1)

    @property
    def visual_loss(self) -> float | None:
        """Visual loss per target token; None without visual targets, or with a model that has no visual loss."""
        return self.sums[1].item() / self.num_visual_tokens if self.num_visual_tokens else None

    @property
    def visual_cosine(self) -> float | None:
        """Mean cosine of predicted and true visual tokens; None where `visual_loss` is."""
        return self.sums[2].item() / self.num_visual_tokens if self.num_visual_tokens else None

    @property
    def visual_cosine_baseline(self) -> float | None:
        """The same of the best constant prediction for each place in the image; None where `visual_loss` is."""
        if not self.num_visual_tokens:
            return None
        return constant_cosine_sum(self.direction_sums).item() / self.num_visual_tokens

    @property
    def num_text_tokens(self) -> int:
        """Supervised text tokens."""
        return round(self.sums[3].item())

    @property
    def num_visual_tokens(self) -> int:
        """Visual target tokens; 0 with a model that has no visual loss."""
        return round(self.sums[4].item())

    @property
    def image_start_accuracy(self) -> float | None:
        """Share of answers with an image in which `<image_start>` is the likeliest token where the first one stands.

        None without such answers.
        """
        return self.sums[5].item() / self.num_image_answers if self.num_image_answers else None

    @property
    def num_image_answers(self) -> int:
        """Answers with an image; 0 with a model that has no `<image_start>`."""
        return round(self.sums[6].item())

    def loss(self, vision_coef: float) -> float:
        """Text loss + `vision_coef` · visual loss, without the `aux_loss` that a mixture of experts is trained with."""
        return self.text_loss + vision_coef * (self.visual_loss or 0.0)

    def as_metrics(self, prefix: str, vision_coef: float) -> dict[str, float]:
        """The values by name, each name beginning with `prefix`; values that are None are left out.

        Args:
            prefix: Such as `eval_`.
            vision_coef: Weight of the visual loss in `loss`.
        """
        values = {"loss": self.loss(vision_coef)} | {name: getattr(self, name) for name in METRICS}
        return {prefix + name: value for name, value in values.items() if value is not None}


class SourceBatches(Sampler[list[int]]):
    """This rank's batches of sample numbers, each of one source. All ranks have as many; missing ones are empty.

    Args:
        dataset: The data.
        batch_size: Samples of a batch of one rank.
        rank: Number of this process.
        world_size: Number of processes.
    """

    def __init__(self, dataset: MixtureDataset, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.batches: list[list[int]] = []
        self.sources: list[str] = []
        """The source of each batch."""
        begin = 0
        for source, count in dataset.sources.items():
            samples = range(begin, begin + count)
            for start in range(0, count, batch_size * world_size):
                own = start + rank * batch_size
                self.batches.append(list(samples[own : own + batch_size]))
                self.sources.append(source)
            begin += count

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


@torch.no_grad()
def evaluate_losses(
    model: nn.Module,
    dataset: MixtureDataset,
    accelerator: Accelerator,
    *,
    batch_size: int = 8,
    num_workers: int = 0,
) -> dict[str, SourceLoss]:
    """Measure the losses of each source. Every rank must call it.

    Samples are padded, not packed, and no random number is drawn from PyTorch's global generator: a run is the same
    with and without evaluation.

    Args:
        model: Wrapped or not; its mode is as before when this returns.
        dataset: The data; `processor` is the model's.
        accelerator: Says how the model computes, and sums over the ranks.
        batch_size: Samples of a batch of one rank.
        num_workers: Processes that load data.

    Returns:
        By the source's name. A source of which nothing could be used has no tokens.
    """
    config = accelerator.unwrap_model(model).config
    batches = SourceBatches(dataset, batch_size, accelerator.process_index, accelerator.num_processes)
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=PaddedCollator(dataset.processor.pad_token_id, config.image_token_id),
        num_workers=num_workers,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # a loader draws a seed, else from the global one
    )
    dtype = sum_dtype(accelerator.device)
    shape = (config.num_image_tokens, config.vision_feature_size)
    width = _NUM_SUMS + math.prod(shape)
    sums = {source: torch.zeros(width, dtype=dtype, device=accelerator.device) for source in dataset.sources}
    was_training = model.training
    model.eval()
    try:
        steps = zip(batches.sources, loader, strict=True)
        for source, batch in Progress(steps, "evaluation", len(batches), unit="batch", delay=2):
            if config.image_start_token_id is not None:
                batch["indices"]["image_starts"] = first_image_starts(
                    batch["labels"], batch["visual_target_mask"], config.image_start_token_id
                )
            batch = send_to_device(batch, accelerator.device)
            with accelerator.autocast():
                outputs = model(**batch)
            starts = batch["indices"].get("image_starts", ())
            sums[source][:_NUM_SUMS] += _loss_sums(outputs, len(starts))
            if outputs.visual_direction_sums is not None:
                sums[source][_NUM_SUMS:] += outputs.visual_direction_sums.flatten()
    finally:
        model.train(was_training)
    totals = accelerator.reduce(torch.stack(list(sums.values())), reduction="sum").cpu()
    return {
        source: SourceLoss(total[:_NUM_SUMS].double(), total[_NUM_SUMS:].double().view(shape))
        for source, total in zip(sums, totals, strict=True)
    }


def metric_names(sources: Iterable[str], *, visual_loss: bool, prefix: str = "eval") -> list[str]:
    """Names of the losses that [`validation_metrics`] may have: a source without visual targets lacks some of them.

    A single source has no names of its own.

    Args:
        sources: Names of the sources.
        visual_loss: Whether the model has a visual loss.
        prefix: As there.
    """
    sums = torch.ones(_NUM_SUMS, dtype=torch.float64)  # only the names count
    sums[4] = float(visual_loss)
    every = SourceLoss(sums, torch.ones(1, 1, dtype=torch.float64))
    names = list(sources)
    prefixes = [f"{prefix}_", *(f"{prefix}_{name}_" for name in names if len(names) > 1)]
    return [name for each in prefixes for name in every.as_metrics(each, 1.0)]


def total_loss(losses: dict[str, SourceLoss]) -> SourceLoss:
    """Of all sources together, each token counting once.

    Args:
        losses: Result of [`evaluate_losses`].
    """
    return SourceLoss(
        torch.stack([loss.sums for loss in losses.values()]).sum(dim=0),
        torch.stack([loss.direction_sums for loss in losses.values()]).sum(dim=0),
    )


def _start_worker(worker: int) -> None:
    ignore_signals()  # the main process decides what to do about them


def _loss_sums(outputs: Any, num_image_answers: int) -> Tensor:
    """[7], see [`SourceLoss`]."""
    text, num_text = outputs.text_loss, outputs.num_text_tokens
    zero = torch.zeros_like(text)
    visual, num_visual, cosine, num_starts = (
        zero if value is None else value
        for value in (outputs.visual_loss, outputs.num_visual_tokens, outputs.visual_cosine, outputs.num_image_starts)
    )
    answers = torch.full_like(zero, num_image_answers)  # filled on the device: a copy would make the host wait
    values = (text * num_text, visual * num_visual, cosine * num_visual, num_text, num_visual, num_starts, answers)
    return torch.stack([value.to(text.device, sum_dtype(text.device)) for value in values])
