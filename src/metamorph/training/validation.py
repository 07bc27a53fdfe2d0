"""Losses on data that is not trained on, for each source: exact means over its tokens, however ranks share them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from tqdm.auto import tqdm
from transformers import TrainingArguments

from metamorph.data.collation import PaddedCollator
from metamorph.data.dataset import MixtureDataset
from metamorph.preemption import ignore_signals
from metamorph.training.metrics import sum_dtype


@dataclass(frozen=True)
class SourceLoss:
    """Means over the tokens of one source, or of all."""

    text_loss: float
    """Cross-entropy per supervised text token, in nats; 0 if there are none."""
    num_text_tokens: int
    """Supervised text tokens."""
    visual_loss: float | None
    """Visual loss per target token; None without visual targets, or with a model that has no visual loss."""
    visual_cosine: float | None
    """Mean cosine of predicted and true visual tokens; None where `visual_loss` is."""
    num_visual_tokens: int
    """Visual target tokens."""

    @classmethod
    def from_sums(cls, sums: Tensor) -> SourceLoss:
        """Of float64 [5]: summed text loss, visual loss and cosine, and the numbers of text and visual tokens."""
        text, visual, cosine, num_text, num_visual = sums.tolist()
        return cls(
            text_loss=text / max(num_text, 1),
            num_text_tokens=round(num_text),
            visual_loss=visual / num_visual if num_visual else None,
            visual_cosine=cosine / num_visual if num_visual else None,
            num_visual_tokens=round(num_visual),
        )

    def loss(self, vision_coef: float) -> float:
        """What training minimises: text loss + `vision_coef` · visual loss."""
        return self.text_loss + vision_coef * (self.visual_loss or 0.0)

    def as_metrics(self, prefix: str, vision_coef: float) -> dict[str, float]:
        """The values by name, each name beginning with `prefix`; values that are None are left out.

        Args:
            prefix: Such as `eval_`.
            vision_coef: Weight of the visual loss in `loss`.
        """
        values = {
            "loss": self.loss(vision_coef),
            "text_loss": self.text_loss,
            "visual_loss": self.visual_loss,
            "visual_cosine": self.visual_cosine,
            "num_text_tokens": self.num_text_tokens,
            "num_visual_tokens": self.num_visual_tokens,
        }
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
    batches = SourceBatches(dataset, batch_size, accelerator.process_index, accelerator.num_processes)
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=PaddedCollator(dataset.processor.pad_token_id),
        num_workers=num_workers,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # a loader draws a seed, else from the global one
    )
    dtype = sum_dtype(accelerator.device)
    sums = {source: torch.zeros(5, dtype=dtype, device=accelerator.device) for source in dataset.sources}
    was_training = model.training
    model.eval()
    try:
        show = None if accelerator.is_main_process else True
        bar = tqdm(zip(batches.sources, loader, strict=True), "Evaluating", len(batches), disable=show, delay=2)
        for source, batch in bar:
            with accelerator.autocast():
                outputs = model(**send_to_device(batch, accelerator.device))
            sums[source] += _loss_sums(outputs)
    finally:
        model.train(was_training)
    totals = accelerator.reduce(torch.stack(list(sums.values())), reduction="sum").cpu()
    return {source: SourceLoss.from_sums(total) for source, total in zip(sums, totals, strict=True)}


def validation_metrics(
    model: nn.Module, dataset: MixtureDataset, accelerator: Accelerator, args: TrainingArguments, *, prefix: str
) -> dict[str, float]:
    """What a run logs of its validation data. Every rank must call it.

    Args:
        model: Wrapped or not.
        dataset: The data.
        accelerator: Of the run.
        args: `per_device_eval_batch_size` and `dataloader_num_workers`.
        prefix: What the names of the values begin with, such as `eval`.
    """
    began = time.perf_counter()
    losses = evaluate_losses(
        model,
        dataset,
        accelerator,
        batch_size=args.per_device_eval_batch_size,
        num_workers=args.dataloader_num_workers,
    )
    coefficient = accelerator.unwrap_model(model).config.vision_coef
    metrics = total_loss(losses).as_metrics(f"{prefix}_", coefficient)
    for source, loss in losses.items():
        metrics |= loss.as_metrics(f"{prefix}_{source}_", coefficient)
    return metrics | {f"{prefix}_runtime": round(time.perf_counter() - began, 3)}


def metric_names(sources: Iterable[str], *, visual_loss: bool, prefix: str = "eval") -> list[str]:
    """Names of the losses that [`validation_metrics`] may have: a source without visual targets lacks some of them.

    Args:
        sources: Names of the sources.
        visual_loss: Whether the model has a visual loss.
        prefix: As there.
    """
    values = {field.name: 1 if visual_loss or "visual" not in field.name else None for field in fields(SourceLoss)}
    every = SourceLoss(**values)  # type: ignore[arg-type]  # only the names count
    prefixes = [f"{prefix}_", *(f"{prefix}_{source}_" for source in sources)]
    return [name for each in prefixes for name in every.as_metrics(each, 1.0)]


def total_loss(losses: dict[str, SourceLoss]) -> SourceLoss:
    """Of all sources together, each token counting once.

    Args:
        losses: Result of [`evaluate_losses`].
    """
    rows = [
        [
            loss.text_loss * loss.num_text_tokens,
            (loss.visual_loss or 0.0) * loss.num_visual_tokens,
            (loss.visual_cosine or 0.0) * loss.num_visual_tokens,
            loss.num_text_tokens,
            loss.num_visual_tokens,
        ]
        for loss in losses.values()
    ]
    return SourceLoss.from_sums(torch.tensor(rows, dtype=torch.float64).sum(dim=0))


def _start_worker(worker: int) -> None:
    ignore_signals()  # the main process decides what to do about them


def _loss_sums(outputs: Any) -> Tensor:
    """[5], see [`SourceLoss.from_sums`]."""
    text, num_text = outputs.text_loss, outputs.num_text_tokens
    zero = torch.zeros_like(text)
    visual, num_visual, cosine = (
        zero if value is None else value
        for value in (outputs.visual_loss, outputs.num_visual_tokens, outputs.visual_cosine)
    )
    values = (text * num_text, visual * num_visual, cosine * num_visual, num_text, num_visual)
    return torch.stack([value.to(text.device, sum_dtype(text.device)) for value in values])
