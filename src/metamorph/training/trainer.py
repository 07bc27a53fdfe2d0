"""`transformers.Trainer` with the two losses of VPiT, normalised over the whole optimizer step."""

import math
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

from metamorph.data.batching.packing import BatchPlanner
from metamorph.data.batching.sampler import PackedExamples, PlannedBatches
from metamorph.data.dataset import MixtureDataset
from metamorph.files.permissions import apply_umask
from metamorph.models.adapters import has_adapter, load_adapter_weights, save_adapter
from metamorph.models.connector import load_connector, save_connector
from metamorph.models.outputs import MetaMorphOutput
from metamorph.runs.find_checkpoint import ResumePoint
from metamorph.training.base_trainer import RunTrainer
from metamorph.training.checkpoints.resume import Position, describe_data
from metamorph.training.checkpoints.weights import load_weights
from metamorph.training.costs.flops import model_flops
from metamorph.training.engines.prepare import whole_weights
from metamorph.training.engines.weights import FrozenTower
from metamorph.training.metrics import LossWindow, count_targets, count_tokens, validation_metrics
from metamorph.training.optimizer import learning_rates, module_of, optimizer_groups
from metamorph.training.reporting.model_card import CardFacts, write_model_card
from metamorph.training.reporting.throughput import ThroughputMonitor, find_peak_tflops


class MetaMorphTrainer(RunTrainer):
    """Trains a MetaMorph model after `apply_stage`.

    With `loss_normalization="global"` the sums of both losses are divided by their numbers of tokens over the whole
    optimizer step: all micro-batches of all ranks. (So is the loss that balances experts, of which each micro-batch
    has its own, weighted by its tokens.) The result does not depend on how a batch is cut into
    micro-batches. `micro_batch` averages each micro-batch by itself, and then over micro-batches and ranks.

    Args:
        stage: 1: checkpoints hold the connector only, 2: the whole model. Both hold all that resuming needs.
        planner: Plans the batches of each epoch.
        tower_on_device: Whether the frozen vision tower computes. Else it stays in main memory, out of the tree of
            modules, so that nothing moves it.
        **kwargs: As for [`RunTrainer`].
    """

    batches: PlannedBatches
    card_facts: CardFacts | None = None
    """What the model card is made of; without them there is none."""
    _knows_its_place = True
    """Whether the number of the step tells the place in the data."""

    def __init__(self, *, stage: int, planner: BatchPlanner, tower_on_device: bool = True, **kwargs: Any) -> None:
        self.frozen_tower: FrozenTower | None = None
        if not tower_on_device:  # before Trainer moves the model
            self.frozen_tower = FrozenTower(
                kwargs["model"], dtype=None, device=torch.device("cpu"), outside=True, keep=False
            )
        super().__init__(batches=PlannedBatches(planner, kwargs["args"].process_index), **kwargs)
        self.stage, self.title = stage, f"stage {stage}"
        self.add_callback(_EpochOfPlan(self.batches))
        # Trainer divides the loss by the number of micro-batches unless the model is said to normalise by a count
        # over the step. Ours does so (by `get_batch_samples`); with `micro_batch` there is no count, and it divides.
        self.model_accepts_loss_kwargs = True
        if "use_cache" in vars(self.model.config):
            del self.model.config.use_cache  # set by Trainer; it would be saved and slow down generation
        self._normalizers: tuple[Tensor, Tensor, Tensor] | None = None
        self._window = LossWindow()

    def create_monitor(self) -> ThroughputMonitor:
        """What measures tokens and FLOPs, too."""
        config = self.model.config
        half = self.args.bf16 or self.args.fp16
        peak = find_peak_tflops(self.args.peak_tflops, half_precision=half, device=self.args.device)
        return ThroughputMonitor(self.accelerator, model_flops(self.model), config.num_image_tokens, peak)

    def examples(self) -> Dataset[Any]:
        """Rows of examples with packing, else examples."""
        if self.train_dataset is None:
            raise ValueError("training needs a train_dataset")
        return PackedExamples(self.train_dataset) if self.batches.planner.packing else self.train_dataset

    def go_on_from(self, point: ResumePoint | None) -> None:
        """See [`RunTrainer`]; the rows that have been trained on are left out."""
        super().go_on_from(point)
        if point is not None:
            self.batches.leave_out(point.epoch, point.trained_rows)

    def prepare_model(self) -> None:
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
        self._knows_its_place = resume_from_checkpoint is None or not self.args.ignore_data_skip
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def release_tower(self) -> None:
        """Leave a plain model behind, its tower in the tree with the weights that it was loaded with.

        To be called when nothing is trained any more.
        """
        if self.frozen_tower is not None:
            self.frozen_tower.restore()
            self.frozen_tower = None
            if not self.is_sharded:
                self.plain_model.model.vision_tower.to(self.args.device)

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor | None]:
        """Fetch the micro-batches of one optimizer step and count their supervised tokens over all ranks.

        Returns:
            The micro-batches, and the number of supervised text tokens of the step (None with `micro_batch`).
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
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
        """Loss of one micro-batch, see the class; `num_items_in_batch` counts text only."""
        normalizers = self._normalizers if model.training else None
        outputs = model(**inputs, loss_normalizers=normalizers)
        if model.training:
            self._window.add(outputs, normalizers)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the losses of each kind to a training log line, see [`RunTrainer`]."""
        if "loss" in logs:
            logs.update(self._window.drain(self.accelerator))
        super().log(logs, start_time)

    def evaluate(
        self,
        eval_dataset: MixtureDataset | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Measure the losses on data that is not trained on, of all sources together and of each.

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

    def optimizer_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """One group for each module, and one of those of its parameters that do not decay."""
        no_decay = dict(model.named_parameters()).keys() - set(self.get_decay_parameter_names(model))
        return optimizer_groups(model, module_of, learning_rates(self.args), self.args.weight_decay, no_decay)

    def record(self) -> dict[str, Any]:
        """Stage, place in the data, and what the data are."""
        position = Position.at(self.state.global_step, self.batches.planner, self.args.gradient_accumulation_steps)
        return {
            "stage": self.stage,
            "position": asdict(position) if self._knows_its_place else None,
            "data": self._data_description,
        }

    @cached_property
    def _data_description(self) -> dict[str, Any]:
        return describe_data(self.train_dataset, self.batches.planner)

    def whole_state_dict(self) -> dict[str, Tensor]:
        """See [`RunTrainer`]; with the frozen tower as it was loaded."""
        state = super().whole_state_dict()
        return state if self.frozen_tower is None else state | self.frozen_tower.state_dict()

    def write_weights(self, folder: Path, state_dict: dict[str, Tensor] | None) -> None:
        """Write connector (stage 1) or model (stage 2), configuration and processor."""
        if self.stage == 1:
            save_connector(self.model, folder, state_dict)
            self.model.config.save_pretrained(folder)
        elif has_adapter(self.model):
            self.model.generation_config.eos_token_id = self.processing_class.end_of_turn_token_ids
            save_adapter(self.model, folder, self.model.adapter_base, state_dict)
        else:
            # Base language models name one end token; ours also end their turns.
            self.model.generation_config.eos_token_id = self.processing_class.end_of_turn_token_ids
            self.model.save_pretrained(folder, state_dict=state_dict)
            apply_umask(*folder.glob("*.safetensors"))
            # It notes the precision that the first weight computes in; those in the files are float32 with any engine.
            self.model.config.dtype = torch.float32
            self.model.config.save_pretrained(folder)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def read_weights(self, folder: str) -> None:
        """Read what `write_weights` has written."""
        if self.stage == 1:
            load_connector(self.model, folder)
        elif has_adapter(self.model):
            load_adapter_weights(self.model, folder)
        else:
            with whole_weights(self.args):
                load_weights(self.model, folder)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write `README.md` into `output_dir`, which says what was trained, and on what.

        Trainer calls it before it pushes to the Hub.
        """
        if self.card_facts is not None and self.is_world_process_zero():
            write_model_card(str(self.args.output_dir), self.card_facts, self.state)


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
