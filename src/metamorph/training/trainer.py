"""Trainer of the model: the two losses of VPiT, normalised over the entire optimizer step."""

from collections.abc import Iterator
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import TrainOutput

from metamorph.data.batching.packing import BatchPlanner, PackedSamples, PlannedBatches
from metamorph.data.dataset import MixtureDataset
from metamorph.files.permissions import apply_umask
from metamorph.models.adapters import has_adapter, load_adapter_weights, save_adapter
from metamorph.models.connector import load_connector, save_connector
from metamorph.models.embeddings import merge_new_token_rows
from metamorph.models.losses import LossNormalizers
from metamorph.models.outputs import MetaMorphOutput
from metamorph.runs.checkpoint_files import explains_write_errors
from metamorph.runs.find_checkpoint import ResumePoint
from metamorph.runs.lock import check_lock
from metamorph.training.arguments import RunArguments
from metamorph.training.base_trainer import RunTrainer
from metamorph.training.checkpoints.resume import Position, describe_data, steps_per_epoch
from metamorph.training.checkpoints.weights import load_weights
from metamorph.training.costs.flops import model_flops
from metamorph.training.engines.prepare import gathered_weights, reads_on_first_process
from metamorph.training.engines.weights import FrozenTower
from metamorph.training.metrics import LossWindow, count_targets, count_tokens, validation_metrics
from metamorph.training.optimizer import learning_rates, module_of, optimizer_groups
from metamorph.training.reporting.benchmarks import Benchmarks
from metamorph.training.reporting.model_card import CardFacts, write_model_card
from metamorph.training.reporting.throughput import ThroughputMonitor, find_peak_tflops


class MetaMorphTrainer(RunTrainer):
    """Trains a MetaMorph model after `apply_stage`.

    With `loss_normalization="global"` the sums of both losses are divided by the number of their tokens in the entire
    optimizer step: all micro-batches of all ranks. The result does not depend on how the batch is split. (The loss that
    balances experts is computed per micro-batch and weighted by its tokens.) `micro_batch` averages within each
    micro-batch, and then over micro-batches and ranks.

    Checkpoints of stage 1 contain the connector, those of stage 2 the model, and everything to resume; those of a
    sharded model contain shards. Without `tower_on_device`, the vision tower stays in main memory, outside of the
    module tree, so that nothing moves it.
    """

    batches: PlannedBatches
    benchmarks: Benchmarks | None = None
    """Also run when the model is evaluated."""
    card_facts: CardFacts | None = None
    """Content of the model card; without it none is written."""
    _knows_position = True
    """Whether the step determines the position in the data."""

    def __init__(self, *, stage: int, planner: BatchPlanner, tower_on_device: bool = True, **kwargs: Any) -> None:
        self.frozen_tower: FrozenTower | None = None
        if not tower_on_device:  # before Trainer moves the model
            self.frozen_tower = FrozenTower(
                kwargs["model"], dtype=None, device=torch.device("cpu"), outside=True, keep=False
            )
        super().__init__(batches=PlannedBatches(planner, kwargs["args"].process_index), **kwargs)
        self.stage, self.title = stage, f"stage {stage}"
        self.add_callback(_EpochOfPlan(self.batches))
        # Trainer divides the loss by the number of micro-batches, unless the model normalises by a count over the step,
        # which `get_batch_samples` returns. With `micro_batch` it returns None, and Trainer divides.
        self.model_accepts_loss_kwargs = True
        if "use_cache" in vars(self.model.config):
            del self.model.config.use_cache  # set by Trainer; it would be saved and slow down generation
        self._normalizers: LossNormalizers | None = None
        self._window = LossWindow()

    def create_monitor(self) -> ThroughputMonitor:
        """The monitor, which also measures tokens and FLOPs."""
        config = self.model.config
        half = self.args.bf16 or self.args.fp16
        peak = find_peak_tflops(self.args.peak_tflops, half_precision=half, device=self.args.device)
        return ThroughputMonitor(self.accelerator, model_flops(self.model), config.num_image_tokens, peak)

    def training_dataset(self) -> Dataset[Any]:
        """The samples, or with packing rows of samples."""
        if self.train_dataset is None:
            raise ValueError("training needs a train_dataset")
        return PackedSamples(self.train_dataset) if self.batches.planner.packing else self.train_dataset

    def set_resume_point(self, point: ResumePoint | None) -> None:
        """See [`RunTrainer`]; leaves out the rows that have been trained on."""
        super().set_resume_point(point)
        if point is not None:
            self.batches.skip_rows(point.epoch, point.trained_rows)

    def before_training(self) -> None:
        """Put the frozen vision tower in its place."""
        if self.frozen_tower is None:
            self.frozen_tower = FrozenTower(
                self.plain_model,
                dtype=torch.bfloat16 if self.args.bf16 else None,
                device=self.args.device,
                outside=self.is_fsdp_enabled or self.is_deepspeed_enabled,
                keep=self.args.should_save,
            )

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> TrainOutput:
        """See [`RunTrainer`]."""
        self._knows_position = resume_from_checkpoint is None or not self.args.ignore_data_skip
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor | None]:
        """The micro-batches of one optimizer step, and the number of its supervised text tokens over all ranks.

        With `micro_batch`, that number is None.
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.args.loss_normalization == "micro_batch" or not batches:
            self._normalizers = None
            return batches, None
        counts = sum(torch.cat([count_targets(batch), count_tokens(batch)[None]]).to(device) for batch in batches)
        counts = self.accelerator.reduce(counts, reduction="sum")
        # Data parallelism averages gradients over the ranks: dividing by count / ranks turns the average into a sum.
        self._normalizers = LossNormalizers(*(counts.clamp(min=1) / self.accelerator.num_processes).unbind())
        return batches, counts[0]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, MetaMorphOutput]:
        """Loss of one micro-batch. `num_items_in_batch` is ignored: it counts text tokens only."""
        normalizers = self._normalizers if model.training else None
        outputs = model(**inputs, loss_normalizers=normalizers)
        if model.training:
            self._window.add(outputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """See [`RunTrainer`]; adds the text and visual losses to a training log entry."""
        if "loss" in logs:
            logs.update(self._window.pop_metrics(self.accelerator))
        super().log(logs, start_time)

    def evaluate(
        self,
        eval_dataset: MixtureDataset | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """The losses on validation data: `eval_loss`, `eval_text_loss`, …, and of each source if there are several.

        Also the figures of the `benchmarks`, unless other data are given.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        metrics: dict[str, float] = {}
        with self.monitor.pause():
            if dataset:
                metrics = validation_metrics(
                    self.model_wrapped if self.is_sharded else self.plain_model,
                    dataset,
                    self.accelerator,
                    self.args,
                    prefix=metric_key_prefix,
                )
            if self.benchmarks is not None and eval_dataset is None:
                metrics |= self.benchmarks.measure(metric_key_prefix)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """For each module one group with and one without weight decay."""
        no_decay = dict(model.named_parameters()).keys() - set(self.get_decay_parameter_names(model))
        return optimizer_groups(model, module_of, learning_rates(self.args), self.args.weight_decay, no_decay)

    def checkpoint_metadata(self) -> dict[str, Any]:
        """Stage, position in the data, and description of the data."""
        position = Position.at(self.state.global_step, self.batches.planner, self.args.gradient_accumulation_steps)
        return {
            "stage": self.stage,
            "position": asdict(position) if self._knows_position else None,
            "data": self._data_description,
        }

    @cached_property
    def _data_description(self) -> dict[str, Any]:
        return describe_data(self.train_dataset, self.batches.planner)

    def full_state_dict(self) -> dict[str, Tensor]:
        """See [`RunTrainer`]; includes the frozen tower as it was loaded."""
        state = super().full_state_dict()
        return state if self.frozen_tower is None else state | self.frozen_tower.state_dict()

    def write_weights(self, folder: Path, state_dict: dict[str, Tensor] | None) -> None:
        """Write connector (stage 1) or model (stage 2), configuration and processor; see [`SavingTrainer`]."""
        if self.stage == 2:
            # Base language models have one end token; ours also end their turns.
            self.model.generation_config.eos_token_id = self.processing_class.end_of_turn_token_ids
        if state_dict is None:
            self.model.config.save_pretrained(folder)
        elif self.stage == 1:
            save_connector(self.model, folder, state_dict)
            self.model.config.save_pretrained(folder)
        elif has_adapter(self.model):
            save_adapter(self.model, folder, self.model.adapter_base, state_dict)
        else:
            self.model.save_pretrained(folder, state_dict=state_dict)
            apply_umask(*folder.glob("*.safetensors"))
            # It records the dtype of the first weight, but those in the files are float32 with any engine.
            self.model.config.dtype = torch.float32
            self.model.config.save_pretrained(folder)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    @property
    def _waits_for_weights(self) -> bool:
        """Whether this process gets weights from the first one, once the model is sharded: see `load_for_engine`."""
        return self.args.process_index > 0 and reads_on_first_process(self.args)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_sharded or not self._waits_for_weights:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def read_weights(self, folder: str) -> None:
        """Load what `write_weights` has written."""
        if self.stage == 1:
            load_connector(self.model, folder)
        elif has_adapter(self.model):
            load_adapter_weights(self.model, folder)
        else:
            with gathered_weights(self.args):
                load_weights(self.model, folder)

    def save_result(self, args: RunArguments) -> None:
        """Write state, flags, card and weights, and leave a plain model in memory where the engine allows it."""
        folder = str(self.args.output_dir)
        check_lock(folder)
        with explains_write_errors(folder, "the result"):
            self.save_state()
            if self.is_world_process_zero():
                args.save(folder)
            self.create_model_card()
            self.save_model()  # with --push_to_hub it also uploads all of the above
        self.accelerator.wait_for_everyone()
        if self.frozen_tower is not None:
            self.frozen_tower.restore()
            self.frozen_tower = None
        if not self.is_sharded and not self._waits_for_weights:
            self.plain_model.model.vision_tower.to(self.args.device)
            merge_new_token_rows(self.plain_model)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the model card to `output_dir`. Trainer calls it before it pushes to the Hub."""
        if self.card_facts is not None and self.is_world_process_zero():
            write_model_card(str(self.args.output_dir), self.card_facts, self.state)


class _EpochOfPlan(TrainerCallback):
    """Sets the epoch of the batch plan from the step counter, which is also right after a resume.

    Trainer calls `set_epoch` of samplers, but wraps the loader of a resumed epoch, and not every version of
    Transformers and Accelerate reaches our sampler through the wrappers.
    """

    def __init__(self, batches: PlannedBatches) -> None:
        self.batches = batches

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        steps = steps_per_epoch(self.batches.planner, args.gradient_accumulation_steps)
        self.batches.set_epoch(state.global_step // steps)
