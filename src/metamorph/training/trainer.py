"""`transformers.Trainer` with the two losses of VPiT, normalised over the whole optimizer step."""

import logging
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import seed_worker

from metamorph.data.batching.packing import BatchPlanner
from metamorph.data.batching.sampler import PackedExamples, PlannedBatches
from metamorph.data.dataset import MixtureDataset
from metamorph.models.embeddings import NewTokenEmbedding, NewTokenHead
from metamorph.models.outputs import MetaMorphOutput
from metamorph.runs.preemption import ignore_signals
from metamorph.training.checkpoints.saving import CheckpointingTrainer
from metamorph.training.costs.flops import model_flops
from metamorph.training.metrics import LossWindow, count_targets, count_tokens, validation_metrics
from metamorph.training.optimizer import optimizer_groups
from metamorph.training.reporting.monitor import RunMonitor, find_peak_tflops


logger = logging.getLogger(__name__)


class MetaMorphTrainer(CheckpointingTrainer):
    """Trains a MetaMorph model after `apply_stage`.

    With `loss_normalization="global"` the sums of both losses are divided by their numbers of tokens over the whole
    optimizer step: all micro-batches of all ranks. (So is the loss that balances experts, of which each micro-batch
    has its own, weighted by its tokens.) The result does not depend on how a batch is cut into
    micro-batches. `micro_batch` averages each micro-batch by itself, and then over micro-batches and ranks.

    Args:
        stage: 1: checkpoints hold the connector only, 2: the whole model. Both hold all that resuming needs.
        planner: Plans the batches of each epoch.
        **kwargs: As for [`ShardedTrainer`].
    """

    optimizer: torch.optim.Optimizer | None
    control: TrainerControl

    def __init__(self, *, stage: int, planner: BatchPlanner, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.stage = stage
        self.batches = PlannedBatches(planner, self.accelerator.process_index)
        self.add_callback(_EpochOfPlan(self.batches))
        # Trainer divides the loss by the number of micro-batches unless the model is said to normalise by a count
        # over the step. Ours does so (by `get_batch_samples`); with `micro_batch` there is no count, and it divides.
        self.model_accepts_loss_kwargs = True
        if "use_cache" in vars(self.model.config):
            del self.model.config.use_cache  # set by Trainer; it would be saved and slow down generation
        self.monitor = self._create_monitor()
        self.add_callback(self.monitor)
        self._normalizers: tuple[Tensor, Tensor, Tensor] | None = None
        self._window = LossWindow()
        self._rates: dict[str, float] = {}

    def _create_monitor(self) -> RunMonitor:
        config = self.model.config
        half = self.args.bf16 or self.args.fp16
        peak = find_peak_tflops(self.args.peak_tflops, half_precision=half, device=self.args.device)
        return RunMonitor(self.accelerator, model_flops(self.model), config.num_image_tokens, peak)

    def get_train_dataloader(self) -> DataLoader:
        """A loader of this rank's batches in the order of the plan, which workers and interruptions do not change."""
        if self.train_dataset is None:
            raise ValueError("training needs a train_dataset")
        loader = DataLoader(
            PackedExamples(self.train_dataset) if self.batches.planner.packing else self.train_dataset,
            batch_sampler=self.batches,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            # Transformers 5.12 has no such flag yet.
            multiprocessing_context=getattr(self.args, "dataloader_multiprocessing_context", None),
            worker_init_fn=partial(
                _start_worker, num_workers=self.args.dataloader_num_workers, rank=self.args.process_index
            ),
        )
        # As Accelerator.prepare does, but the batches are this rank's already.
        return prepare_data_loader(
            loader,
            device=self.accelerator.device,
            num_processes=1,
            process_index=0,
            put_on_device=self.accelerator.device_placement,
            non_blocking=self.accelerator.non_blocking,
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor | None]:
        """Fetch the micro-batches of one optimizer step and count their supervised tokens over all ranks.

        Args:
            epoch_iterator: Yields micro-batches.
            num_batches: Micro-batches of the step.
            device: Where the counts are kept.

        Returns:
            The micro-batches, and the number of supervised text tokens of the step (None with `micro_batch`).
        """
        batches = self.monitor.fetch(epoch_iterator, num_batches)
        if self.args.loss_normalization == "micro_batch" or not batches:
            self._normalizers = None
            return batches, None
        counts = sum(torch.cat([count_targets(batch), count_tokens(batch)[None]]).to(device) for batch in batches)
        counts = self.accelerator.reduce(counts, reduction="sum")
        # Data parallelism averages gradients over the ranks: dividing by count / ranks makes that average the sum.
        text, visual, tokens = (counts.clamp(min=1) / self.accelerator.num_processes).unbind()
        self._normalizers = (text, visual, tokens)
        return batches, counts[0]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, MetaMorphOutput]:
        """Loss of one micro-batch, see the class.

        Args:
            model: The (wrapped) model.
            inputs: A batch of the collator.
            return_outputs: Also return the model's output.
            num_items_in_batch: Ignored: it counts text only.
        """
        normalizers = self._normalizers if model.training else None
        outputs = model(**inputs, loss_normalizers=normalizers)
        if model.training:
            self._window.add(outputs, normalizers)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the losses of each kind and the learning rates of the modules to a training log line.

        Args:
            logs: Values to log.
            start_time: Start of the run.
        """
        if "loss" in logs:
            logs.update(self._window.drain(self.accelerator))
            logs.update(self._rates)
            logs.update(self.monitor.drain(self.state, logs.get("grad_norm")))
        if "train_runtime" in logs:  # the last line of a run; Trainer would count rows as samples
            self.monitor.settle(self.state)
            logs["total_flos"] = self.state.total_flos
            logs["train_samples_per_second"] = round(self.monitor.total_samples / logs["train_runtime"], 3)
        super().log(logs, start_time)

    def evaluate(
        self,
        eval_dataset: MixtureDataset | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Measure the losses on data that is not trained on, of all sources together and of each.

        Args:
            eval_dataset: Defaults to the trainer's.
            ignore_keys: Ignored: only losses are measured.
            metric_key_prefix: What the names of the values begin with.

        Returns:
            `eval_loss`, `eval_text_loss`, `eval_visual_loss`, …, and `eval_SOURCE_text_loss`, … for each source of
            several.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        with self.monitor.pause():
            metrics = validation_metrics(
                self.model_wrapped if self.is_sharded else self.plain_model,
                dataset,
                self.accelerator,
                self.args,
                prefix=metric_key_prefix,
            )
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Nothing: Transformers' estimate counts frozen parameters and padding; the monitor counts `total_flos`.

        Args:
            inputs: A batch.
        """
        return 0

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """As Trainer does, with counters up to date and the clock of the speed stopped: no hook comes before it."""
        self.monitor.settle(self.state)
        with self.monitor.pause():
            super()._save_checkpoint(*args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Build the optimizer with one group for each module.

        Args:
            model: Defaults to the trainer's model.
        """
        if self.optimizer is None:
            model = self.model if model is None else model
            groups = optimizer_groups(model, self.args, set(self.get_decay_parameter_names(model)))
            optimizer_class, kwargs = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = optimizer_class(groups, **kwargs)
            if kwargs.get("optim_bits") == 8:
                _keep_embeddings_in_32_bits(model)
        return self.optimizer

    def _get_learning_rate(self) -> float:
        """Trainer asks once in every step, before the scheduler moves on: note the rates of all modules with it."""
        groups = [group for group in self.create_optimizer().param_groups if "no_decay" not in group["name"]]
        self._rates = {f"lr_{group['name']}": group["lr"] for group in groups}
        return super()._get_learning_rate()


def _keep_embeddings_in_32_bits(model: nn.Module) -> None:
    """Exempt embedding tables from the 8-bit state of bitsandbytes' optimizers, as Trainer does; and rows of them.

    Args:
        model: What is trained, before the first step.
    """
    from bitsandbytes.optim import GlobalOptimManager

    manager = GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})
        elif isinstance(module, (NewTokenEmbedding, NewTokenHead)):
            manager.register_module_override(module, "new_rows", {"optim_bits": 32})


def _start_worker(worker: int, num_workers: int, rank: int) -> None:
    ignore_signals()
    seed_worker(worker, num_workers=num_workers, rank=rank)


class _EpochOfPlan(TrainerCallback):
    """Sets the epoch of the plan from the step counter: so it is right after a resume, too.

    Trainer hands the epoch on to samplers, but its loader of a resumed epoch hides ours behind others, through which
    not every version of Transformers and Accelerate reaches.
    """

    def __init__(self, batches: PlannedBatches) -> None:
        self.batches = batches

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        steps = math.ceil(len(self.batches) / args.gradient_accumulation_steps)
        self.batches.set_epoch(state.global_step // steps)
