"""Base of both trainers: `transformers.Trainer` with atomic checkpoints, exact resumes, preemption and our log."""

from __future__ import annotations

import logging
import math
import pickle
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PrinterCallback, TrainerControl, TrainerState
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_utils import TrainOutput, seed_worker

from metamorph.data.bad_records import BadRecordLimit
from metamorph.runs.checkpoint_files import CheckpointError
from metamorph.runs.find_checkpoint import ResumePoint
from metamorph.runs.preemption import Preemption, ignore_signals
from metamorph.training.callbacks import StopOnBadRecords, StopWhenPreempted
from metamorph.training.checkpoints.saving import SavingTrainer
from metamorph.training.checkpoints.weights import TRAINER_STATE_FILE
from metamorph.training.optimizer import keep_embeddings_in_32_bits
from metamorph.training.reporting.monitor import RunMonitor
from metamorph.training.reporting.progress import ShowProgress
from metamorph.training.reporting.trackers import set_up_trackers


logger = logging.getLogger(__name__)

_GIVEN_BY_FLAGS = ("initial_lr", "weight_decay", "betas", "eps")
"""Options of parameter groups that come from the flags, not from a checkpoint. The scheduler sets `lr`."""


class RunTrainer(SavingTrainer):
    """Base of the trainers of the model and of the visualizer.

    A subclass defines what to train on (`batches`, `training_dataset`), what to save (`write_weights`, `read_weights`,
    `checkpoint_metadata`) and which parameters share a learning rate (`parameter_groups`). Some overridden methods of
    Trainer are private; they are the same in all versions that we support, and there is no public hook.

    `batches` is the batch sampler of this process; its order does not depend on workers or interruptions.
    """

    optimizer: torch.optim.Optimizer | None
    lr_scheduler: Any
    title: str
    """What is trained, for the progress bar."""
    control: TrainerControl
    resume_point: ResumePoint | None = None
    _given: list[dict[str, Any]]

    def __init__(self, *, batches: Sampler[Any], **kwargs: Any) -> None:
        args = kwargs["args"]
        if is_initialized() and AcceleratorState().mixed_precision != args.mixed_precision:
            # Set by an earlier trainer of this process; Accelerate would refuse to change it.
            AcceleratorState._reset_state()
        # The layers are compiled already. Accelerate would compile the entire model around them.
        compiler = args.torch_compile, args.torch_compile_backend, args.torch_compile_mode
        args.torch_compile, args.torch_compile_backend, args.torch_compile_mode = False, None, None
        super().__init__(**kwargs)
        args.torch_compile, args.torch_compile_backend, args.torch_compile_mode = compiler  # as checkpoints record it
        self.batches = batches
        self.trackers = set_up_trackers(self.callback_handler.callbacks, str(self.args.output_dir))
        self.monitor = self.create_monitor()
        self.add_callback(self.monitor)
        self._rates: dict[str, float] = {}

    # Defined by subclasses.

    def create_monitor(self) -> RunMonitor:
        """The callback that measures the run."""
        raise NotImplementedError

    def training_dataset(self) -> Dataset[Any]:
        """The dataset that `batches` index."""
        assert isinstance(self.train_dataset, Dataset)
        return self.train_dataset

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Parameter groups with `params`, `lr`, `weight_decay` and a `name`, which the log uses."""
        raise NotImplementedError

    def before_training(self) -> None:
        """Change the model for training; not called where there is nothing left to train."""

    # Running.

    def run(
        self, checkpoint: str | None, point: ResumePoint | None, limit: BadRecordLimit, preemption: Preemption
    ) -> TrainOutput:
        """Train to the end, or until a signal or too many bad records stop all processes at the same step.

        Without a `point`, Trainer derives the position in the data from the step of the checkpoint.

        Raises `Preempted` (after a signal) or `Interrupted` (after Ctrl-C) once a checkpoint is written, and
        `TooManyBadRecordsError`.
        """
        for display in (DEFAULT_PROGRESS_CALLBACK, PrinterCallback):
            self.remove_callback(display)
        if not any(isinstance(callback, ShowProgress) for callback in self.callback_handler.callbacks):
            self.add_callback(ShowProgress(self.title))
        self.add_callback(StopOnBadRecords(limit))
        self.monitor.skipped_records = lambda: limit.num_bad
        self.set_resume_point(point)
        stop = StopWhenPreempted(preemption, checkpoint)
        self.add_callback(stop)
        result = self.train(resume_from_checkpoint=checkpoint)
        stop.leave_if_stopped(self)
        return result

    def set_resume_point(self, point: ResumePoint | None) -> None:
        """Set where in the data `train` resumes. Every process must call it."""
        self.resume_point = point

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> TrainOutput:
        """Train, or only load the weights if the checkpoint is already at the last step.

        There `transformers.Trainer` would do one step too many (seen in 5.23, when the last step is not the last of an
        epoch), and restarting a finished run would change its result.
        """
        try:
            if resume_from_checkpoint is not None:
                state = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / TRAINER_STATE_FILE))
                if self.resume_point is not None:
                    state.global_step = self.resume_point.step
                if self._is_finished(state):
                    logger.info("%s is at the last step: nothing left to train", resume_from_checkpoint)
                    best = state.best_model_checkpoint if self.args.load_best_model_at_end else None
                    self._load_from_checkpoint(resume_from_checkpoint if best is None else best)
                    self.state = state
                    return TrainOutput(state.global_step, math.nan, {})
            self.before_training()
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        except pickle.UnpicklingError as error:  # all of its files are read with weights_only=True
            raise CheckpointError(
                f"optimizer, scheduler or rng_state of {resume_from_checkpoint} hold more than tensors and numbers; "
                "that is refused because loading it can run code: resume from another checkpoint"
            ) from error

    def _is_finished(self, state: TrainerState) -> bool:
        if self.args.max_steps > 0:
            return state.global_step >= self.args.max_steps
        return (state.epoch or 0) >= self.args.num_train_epochs

    def _init_training_state(self, max_steps: int, steps_in_epoch: int, *args: Any) -> tuple[int, int]:
        """Trainer starts at the step of the checkpoint, but steps may have another size now: see `ResumePoint`."""
        start = super()._init_training_state(max_steps, steps_in_epoch, *args)
        self.state.compute_steps(self.args, max_steps)  # Trainer keeps the checkpoint's save_steps and logging_steps
        if self.resume_point is None:
            return start
        self.state.global_step = self.resume_point.step
        epoch, steps = divmod(self.resume_point.step, steps_in_epoch)
        return epoch, steps * self.args.gradient_accumulation_steps

    # Data.

    def get_train_dataloader(self) -> DataLoader:
        """Data loader of this process's batches."""
        loader = DataLoader(
            self.training_dataset(),
            batch_sampler=self.batches,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            # Not in Transformers 5.12.
            multiprocessing_context=getattr(self.args, "dataloader_multiprocessing_context", None),
            worker_init_fn=partial(
                _start_worker, num_workers=self.args.dataloader_num_workers, rank=self.args.process_index
            ),
        )
        # Like Accelerator.prepare, but the batches are already those of this process.
        return prepare_data_loader(
            loader,
            device=self.accelerator.device,
            num_processes=1,
            process_index=0,
            put_on_device=False,  # see get_batch_samples
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor | None]:
        """Fetch the micro-batches of one optimizer step, and count them."""
        self.finish_checkpoint(wait=False)
        with self.monitor.wait():
            batches = list(islice(epoch_iterator, num_batches))
        # From pinned memory, copies to the GPU overlap with the computation; they are not data-waiting time.
        non_blocking = self.accelerator.non_blocking or self.args.dataloader_pin_memory
        batches = [send_to_device(batch, self.accelerator.device, non_blocking=non_blocking) for batch in batches]
        self.monitor.count(batches)
        return batches, None

    # Log lines.

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add learning rates and the measurements of the monitor to a training log entry."""
        if "loss" in logs:
            logs.update(self._rates)
            logs.update(self.monitor.pop_metrics(self.state, logs.get("grad_norm")))
        if "train_runtime" in logs:  # the last entry of a run; Trainer would count rows as samples
            self.finish_checkpoint()  # before the best one is loaded, and before the run ends
            self.monitor.sync(self.state)
            logs["total_flos"] = self.state.total_flos
            logs["train_samples_per_second"] = round(self.monitor.total_samples / logs["train_runtime"], 3)
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """0: Transformers' estimate counts frozen parameters and padding. Monitors may count `total_flos` instead."""
        return 0

    def _get_learning_rate(self) -> float:
        """Called by Trainer once per step, before the scheduler advances: also notes the rates of all modules."""
        groups = [group for group in self.create_optimizer().param_groups if "no_decay" not in group["name"]]
        self._rates = {f"lr_{group['name']}": float(group["lr"]) for group in groups}  # torchao has a tensor
        return super()._get_learning_rate()

    # Optimizer and schedule.

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer with the groups of `parameter_groups`."""
        if self.optimizer is None:
            model = self.model if model is None else model
            optimizer_class, kwargs = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = optimizer_class(self.parameter_groups(model), **kwargs)
            if kwargs.get("optim_bits") == 8:
                keep_embeddings_in_32_bits(model)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        """Create the scheduler, and note the optimizer's options before a checkpoint overwrites them."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        optimizer = self.optimizer if optimizer is None else optimizer
        assert optimizer is not None
        groups = optimizer.param_groups
        self._given = [{name: group[name] for name in _GIVEN_BY_FLAGS if name in group} for group in groups]
        return scheduler

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Like Trainer's, but keeps learning rates and weight decay of this run instead of the checkpoint's."""
        scheduler = self.lr_scheduler
        rates = list(getattr(scheduler, "base_lrs", []))
        self.load_optimizer(checkpoint)
        if checkpoint is None:
            return
        assert self.optimizer is not None
        for group, given in zip(self.optimizer.param_groups, self._given, strict=True):
            group.update(given)
        recounted = self.resume_point is not None and self.resume_point.rescales_steps
        if not isinstance(scheduler, LambdaLR):  # its state contains the rates
            if recounted:
                logger.warning("%s keeps its own count of steps", type(scheduler).__name__)
            return
        step = self.resume_point.step if recounted and self.resume_point is not None else scheduler.last_epoch
        # With --learning_rate auto, the peak rate also depends on the size of a step.
        scheduler.load_state_dict({**scheduler.state_dict(), "base_lrs": rates, "last_epoch": step - 1})
        scheduler.step()  # sets the rates of this step


def _start_worker(worker: int, num_workers: int, rank: int) -> None:
    ignore_signals()
    seed_worker(worker, num_workers=num_workers, rank=rank)
