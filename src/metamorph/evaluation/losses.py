"""Losses on validation data, for each source: exact means over its tokens, however ranks share them."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader

from metamorph.data.batching.collation import PaddedCollator
from metamorph.data.dataset import MixtureDataset
from metamorph.models.batch_indices import first_image_starts
from metamorph.models.losses import constant_cosine_sum, sum_dtype
from metamorph.models.outputs import stack_fields
from metamorph.runs.preemption import ignore_signals
from metamorph.runs.progress import Progress


VISUAL_METRICS = ("visual_loss", "visual_cosine", "visual_cosine_baseline")
METRICS = (
    *("loss", "text_loss", *VISUAL_METRICS, "image_start_accuracy"),
    *("num_text_tokens", "num_visual_tokens", "num_image_answers"),
)
"""Names in the results of [`SourceLoss.as_metrics`], if all are defined."""


class SourceLoss(NamedTuple):
    """Results for one source, or all, as sums over its tokens."""

    text_loss_sum: float
    visual_loss_sum: float
    visual_cosine_sum: float
    num_text_tokens: float
    """Supervised text tokens."""
    num_visual_tokens: float
    """Visual target tokens."""
    num_image_starts: float
    """Answers with an image that the model begins."""
    num_image_answers: float
    """All answers with an image."""
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
        values = {"text_loss": self.text_loss_sum / self.num_text_tokens if self.num_text_tokens else 0.0}
        if self.num_visual_tokens:
            values["visual_loss"] = self.visual_loss_sum / self.num_visual_tokens
            values["visual_cosine"] = self.visual_cosine_sum / self.num_visual_tokens
            values["visual_cosine_baseline"] = constant_cosine_sum(self.direction_sums).item() / self.num_visual_tokens
        if self.num_image_answers:
            values["image_start_accuracy"] = self.num_image_starts / self.num_image_answers
        for name in ("num_text_tokens", "num_visual_tokens", "num_image_answers"):
            values[name] = round(getattr(self, name))
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
    # One row for each source, in the order of `SourceLoss`: 0-d sums, then the flattened direction sums.
    num_sums = len(SourceLoss._fields) - 1
    sums = {
        source: torch.zeros(num_sums + math.prod(shape), dtype=dtype, device=accelerator.device)
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
            row = sums[source]
            row[: num_sums - 1] += stack_fields(outputs, SourceLoss._fields[: num_sums - 1])
            row[num_sums - 1] += len(batch["indices"].get("image_starts", ()))
            if outputs.visual_direction_sums is not None:
                row[num_sums:] += outputs.visual_direction_sums.flatten()
    finally:
        model.train(was_training)
    totals = accelerator.reduce(torch.stack(list(sums.values())), reduction="sum").cpu()
    return {
        source: SourceLoss._make([*total[:num_sums].tolist(), total[num_sums:].double().view(shape)])
        for source, total in zip(sums, totals, strict=True)
    }


def metric_names(sources: Iterable[str], *, visual_loss: bool) -> list[str]:
    """Names of the losses that validation may log; a source without visual targets lacks some of them.

    A single source has no names of its own. `visual_loss` is False for a model without one.
    """
    metrics = [name for name in METRICS if visual_loss or name not in VISUAL_METRICS]
    names = list(sources)
    prefixes = ["eval_", *(f"eval_{name}_" for name in names if len(names) > 1)]
    return [prefix + name for prefix in prefixes for name in metrics]


def total_loss(losses: dict[str, SourceLoss]) -> SourceLoss:
    """Join the sources of `evaluate_losses`, each token counting once."""
    return SourceLoss._make(map(sum, zip(*losses.values(), strict=True)))


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
