"""Losses on validation data, for each source: exact means over its tokens, however ranks share them."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader

from metamorph.data.batching.collation import PaddedCollator
from metamorph.data.dataset import MixtureDataset
from metamorph.models.batch_indices import first_image_starts
from metamorph.models.losses import constant_cosine_sum, sum_dtype
from metamorph.runs.preemption import ignore_signals
from metamorph.runs.progress import Progress


_NUM_SUMS = 7


@dataclass(frozen=True)
class SourceLoss:
    """Results for one source, or all, as sums over its tokens."""

    sums: Tensor
    """float64 [7] on the CPU: text loss, visual loss and cosine; the numbers of supervised text tokens and of visual
    target tokens; of answers with an image, those that the model begins, and all."""
    direction_sums: Tensor
    """float64 [N, D] on the CPU, see `metamorph.models.losses.direction_sums`."""

    def as_metrics(self, prefix: str = "", vision_coef: float = 1.0) -> dict[str, float]:
        """Means and counts by name, with a prefix such as `eval_`; those that are not defined here are left out.

        `loss` lacks the `aux_loss` that a mixture of experts is trained with. `text_loss` is the cross-entropy per
        supervised text token in nats, 0 if there are none. `visual_loss` and `visual_cosine` (of predicted and true
        visual tokens) are means over target tokens, and `visual_cosine_baseline` is the cosine of the best constant
        prediction for each place in the image. `image_start_accuracy` is the share of the answers with an image in
        which `<image_start>` is the likeliest token where the first begins.
        """
        text, visual, cosine, *counts = self.sums.tolist()
        num_text, num_visual, num_starts, num_answers = map(round, counts)
        values = {"text_loss": text / num_text if num_text else 0.0}
        if num_visual:
            values["visual_loss"], values["visual_cosine"] = visual / num_visual, cosine / num_visual
            values["visual_cosine_baseline"] = constant_cosine_sum(self.direction_sums).item() / num_visual
        if num_answers:
            values["image_start_accuracy"] = num_starts / num_answers
        values |= {"num_text_tokens": num_text, "num_visual_tokens": num_visual, "num_image_answers": num_answers}
        loss = values["text_loss"] + vision_coef * values.get("visual_loss", 0.0)
        return {prefix + name: value for name, value in {"loss": loss, **values}.items()}


@torch.no_grad()
def evaluate_losses(
    model: nn.Module,
    dataset: MixtureDataset,
    accelerator: Accelerator,
    *,
    batch_size: int = 8,
    num_workers: int = 0,
) -> dict[str, SourceLoss]:
    """Measure the losses of each source, by its name. Every rank must call it.

    Samples are padded, not packed, in batches of `batch_size` on each rank. PyTorch's global generator is not used, and
    the mode of the model (wrapped or not) is restored: a run is the same with and without evaluation. A source without
    usable records has no tokens.
    """
    config = accelerator.unwrap_model(model).config
    batches = _source_batches(dataset, batch_size, accelerator.process_index, accelerator.num_processes)
    loader = DataLoader(
        dataset,
        batch_sampler=[numbers for _, numbers in batches],
        collate_fn=PaddedCollator(dataset.processor.pad_token_id, config.image_token_id),
        num_workers=num_workers,
        worker_init_fn=ignore_signals,
        generator=torch.Generator(),  # otherwise the loader takes its seed from the global one
    )
    dtype = sum_dtype(accelerator.device)
    shape = (config.num_image_tokens, config.vision_feature_size)
    # One row for each source: the seven sums, then the direction sums.
    sums = {
        source: torch.zeros(_NUM_SUMS + math.prod(shape), dtype=dtype, device=accelerator.device)
        for source in dataset.sources
    }
    was_training = model.training
    model.eval()
    try:
        steps = zip([source for source, _ in batches], loader, strict=True)
        for source, batch in Progress(steps, "evaluation", len(batches), unit="batch", delay=2):
            if config.image_start_token_id is not None:
                batch["indices"]["image_starts"] = first_image_starts(
                    batch["labels"], batch["visual_target_mask"], config.image_start_token_id
                )
            batch = send_to_device(batch, accelerator.device)
            with accelerator.autocast():
                outputs = model(**batch)
            sums[source][:_NUM_SUMS] += _loss_sums(outputs, len(batch["indices"].get("image_starts", ())))
            if outputs.visual_direction_sums is not None:
                sums[source][_NUM_SUMS:] += outputs.visual_direction_sums.flatten()
    finally:
        model.train(was_training)
    totals = accelerator.reduce(torch.stack(list(sums.values())), reduction="sum").cpu()
    return {
        source: SourceLoss(total[:_NUM_SUMS].double(), total[_NUM_SUMS:].double().view(shape))
        for source, total in zip(sums, totals, strict=True)
    }


def metric_names(sources: Iterable[str], *, visual_loss: bool) -> list[str]:
    """Names of the losses that validation may log; a source without visual targets lacks some of them.

    A single source has no names of its own. `visual_loss` is False for a model without one.
    """
    sums = torch.ones(_NUM_SUMS, dtype=torch.float64)  # only the names count
    sums[4] = float(visual_loss)
    every = SourceLoss(sums, torch.ones(1, 1, dtype=torch.float64))
    names = list(sources)
    prefixes = ["eval_", *(f"eval_{name}_" for name in names if len(names) > 1)]
    return [name for each in prefixes for name in every.as_metrics(each)]


def total_loss(losses: dict[str, SourceLoss]) -> SourceLoss:
    """Join the sources of `evaluate_losses`, each token counting once."""
    return SourceLoss(
        torch.stack([loss.sums for loss in losses.values()]).sum(dim=0),
        torch.stack([loss.direction_sums for loss in losses.values()]).sum(dim=0),
    )


def _source_batches(
    dataset: MixtureDataset, batch_size: int, rank: int, world_size: int
) -> list[tuple[str, list[int]]]:
    """This rank's batches of sample numbers, each of one source. All ranks have the same number; some may be empty."""
    batches = []
    begin = 0
    for source, count in dataset.sources.items():
        samples = range(begin, begin + count)
        for start in range(0, count, batch_size * world_size):
            own = start + rank * batch_size
            batches.append((source, list(samples[own : own + batch_size])))
        begin += count
    return batches


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
