"""`transformers.Trainer` with the two losses of VPiT, normalised over the whole optimizer step."""

import json
import logging
import math
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import TrainOutput, seed_worker

from metamorph.data.batches import PackedExamples, PlannedBatches
from metamorph.data.packing import BatchPlanner
from metamorph.models.constants import IGNORE_INDEX
from metamorph.models.outputs import MetaMorphOutput
from metamorph.training.checkpoint import TRAINER_STATE_FILE, load_connector, load_weights, save_connector
from metamorph.training.stages import optimizer_groups


logger = logging.getLogger(__name__)


class LossWindow:
    """Sums of the losses of each kind since the last log line, kept on the device: no host sync until they are read."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    def add(self, outputs: MetaMorphOutput, normalizers: tuple[Tensor, Tensor] | None) -> None:
        """Add one micro-batch.

        Args:
            outputs: Losses and counts of the micro-batch.
            normalizers: What the model divided the two losses by; None means its own counts.
        """
        if outputs.text_loss is None or outputs.num_text_tokens is None:
            raise ValueError("the model returned no losses: the batch has no labels")
        text, num_text = outputs.text_loss.detach(), outputs.num_text_tokens
        visual, num_visual, cosine = (
            torch.zeros_like(text) if value is None else value.detach()
            for value in (outputs.visual_loss, outputs.num_visual_tokens, outputs.visual_cosine)
        )
        by_text, by_visual = normalizers or (num_text.clamp(min=1), num_visual.clamp(min=1))
        values = (text * by_text, visual * by_visual, cosine * num_visual, num_text, num_visual)
        sums = torch.stack([value.float() for value in values])
        self._sums = sums if self._sums is None else self._sums + sums

    def drain(self, accelerator: Accelerator) -> dict[str, float]:
        """The means over all tokens of all ranks since the last call. Every rank must call it.

        Args:
            accelerator: Sums over the ranks.
        """
        if self._sums is None:
            return {}
        sums = accelerator.reduce(self._sums, reduction="sum").tolist()
        self._sums = None
        text, visual, cosine, num_text, num_visual = sums
        logs = {"text_loss": text / max(num_text, 1), "num_text_tokens": num_text}
        if num_visual:
            logs |= {"visual_loss": visual / num_visual, "visual_cosine": cosine / num_visual}
        return logs | {"num_visual_tokens": num_visual}


class MetaMorphTrainer(Trainer):
    """Trains a MetaMorph model after `apply_stage`.

    With `loss_normalization="global"` the sums of both losses are divided by their numbers of tokens over the whole
    optimizer step: all micro-batches of all ranks. The result does not depend on how a batch is cut into
    micro-batches. `micro_batch` averages each micro-batch by itself, and then over micro-batches and ranks.

    Args:
        stage: 1: checkpoints hold the connector only, 2: the whole model. Both hold all that resuming needs.
        planner: Plans the batches of each epoch.
        **kwargs: As for `transformers.Trainer`.
    """

    optimizer: torch.optim.Optimizer | None

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
        self._normalizers: tuple[Tensor, Tensor] | None = None
        self._window = LossWindow()
        self._rates: dict[str, float] = {}

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> TrainOutput:
        """Train, or only load the weights of a checkpoint that is already at the last step.

        `transformers.Trainer` would do one step too many there (seen in 5.23, when the last step is not the last of
        an epoch), so that restarting a finished run would change its result.

        Args:
            resume_from_checkpoint: Folder of a checkpoint.
            **kwargs: As for `transformers.Trainer.train`.
        """
        if resume_from_checkpoint is not None:
            state = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / TRAINER_STATE_FILE))
            if self._is_finished(state):
                logger.info("%s is at the last step already: there is nothing left to train", resume_from_checkpoint)
                self._load_from_checkpoint(resume_from_checkpoint)
                self.state = state
                return TrainOutput(state.global_step, math.nan, {})
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _is_finished(self, state: TrainerState) -> bool:
        if self.args.max_steps > 0:
            return state.global_step >= self.args.max_steps
        return (state.epoch or 0) >= self.args.num_train_epochs

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
                seed_worker, num_workers=self.args.dataloader_num_workers, rank=self.args.process_index
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
        batches = list(islice(epoch_iterator, num_batches))
        if self.args.loss_normalization == "micro_batch" or not batches:
            self._normalizers = None
            return batches, None
        counts = sum(count_targets(batch).to(device) for batch in batches)
        counts = self.accelerator.reduce(counts, reduction="sum")
        # Data parallelism averages gradients over the ranks: dividing by count / ranks makes that average the sum.
        text, visual = (counts.clamp(min=1) / self.accelerator.num_processes).unbind()
        self._normalizers = (text, visual)
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
        super().log(logs, start_time)

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
        return self.optimizer

    def _get_learning_rate(self) -> float:
        """Trainer asks once in every step, before the scheduler moves on: note the rates of all modules with it."""
        groups = [group for group in self.create_optimizer().param_groups if "no_decay" not in group["name"]]
        self._rates = {f"lr_{group['name']}": group["lr"] for group in groups}
        return super()._get_learning_rate()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write connector (stage 1) or model (stage 2), configuration and processor; the main process only."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        if self.stage == 1:
            save_connector(self.model, folder)
            self.model.config.save_pretrained(folder)
        else:
            # Base language models name one end token; ours also end their turns.
            self.model.generation_config.eos_token_id = self.processing_class.end_of_turn_token_ids
            self.model.save_pretrained(folder, state_dict=state_dict)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        arguments = json.dumps(self.args.to_sanitized_dict(), indent=2, default=str)
        (folder / "training_args.json").write_text(arguments + "\n", encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        elif self.stage == 1:
            load_connector(self.model, resume_from_checkpoint)
        else:
            load_weights(self.model, resume_from_checkpoint)


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


def count_targets(batch: dict[str, Any]) -> Tensor:
    """[2] the numbers of text tokens and of visual tokens that a batch supervises.

    Position 0 of a row is never predicted, so it does not count.

    Args:
        batch: With `labels` [batch, sequence] and, unless there are no images, `visual_target_mask` of that shape.
    """
    text = (batch["labels"][:, 1:] != IGNORE_INDEX).sum()
    mask = batch.get("visual_target_mask")
    visual = torch.zeros_like(text) if mask is None else mask[:, 1:].sum()
    return torch.stack([text, visual])
