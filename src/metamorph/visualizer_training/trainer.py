"""The visualizer's trainer: `RunTrainer` with frozen encoders, a moving average, validation images and the result."""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from metamorph.files.model_files import check_finite
from metamorph.files.permissions import save_file
from metamorph.runs.checkpoint_files import explains_write_errors
from metamorph.runs.find_checkpoint import ResumePoint
from metamorph.runs.lock import check_lock
from metamorph.training.base_trainer import RunTrainer
from metamorph.training.optimizer import optimizer_groups
from metamorph.training.reporting.monitor import RunMonitor
from metamorph.visualizer_training.arguments import DEFAULT_LR_SCHEDULER, VisualizerArguments
from metamorph.visualizer_training.average import MovingAverage, trainable_parameters
from metamorph.visualizer_training.dataset import StreamBatches
from metamorph.visualizer_training.denoising import Denoiser, FrozenEncoders, RandomInputs, sample_latents
from metamorph.visualizer_training.export import draw_validation_grid, render_visualizer_card, save_pipeline
from metamorph.visualizer_training.fsdp2 import gather, shard_like, unsharded_copy
from metamorph.visualizer_training.resume import WEIGHTS_FILE


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class VisualizerResult:
    """Result of a run."""

    output_dir: Path
    """Pipeline folder: `VisualizationPipeline.from_pretrained(output_dir)`."""
    losses: list[float]
    """Mean loss of each optimizer step of this run, over all processes."""
    first_step: int
    """Steps done before this run (0 unless resumed)."""
    seconds: float
    """Duration of the training loop."""
    is_main_process: bool
    """Whether this process is the one that writes and reports."""


class VisualizerTrainer(RunTrainer):
    """Trains a [`Denoiser`] on images, or on their encodings.

    At every checkpoint it reconstructs the `validation` images and records `data`, which decides the order of images.
    """

    title = "visualizer"
    saves_shards = False  # checkpoints are plain with every engine: the network is small
    args: VisualizerArguments
    batches: StreamBatches

    def __init__(
        self, *, encoders: FrozenEncoders, validation: Sequence[Image.Image], data: dict[str, Any], **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.encoders, self.validation, self.data = encoders, validation, data
        self.losses: list[Tensor] = []
        """`[2]` for each step of this run: loss and number of good images, both divided by the number of all images."""
        self._sums: Tensor | None = None
        self._micro_batches = self._logged = 0
        self.average = MovingAverage(self.plain_model, self.args.ema_decay) if self.args.ema_decay else None
        if self.average is not None:
            self.add_callback(self.average)

    def create_monitor(self) -> RunMonitor:
        """A monitor that counts samples."""
        return RunMonitor(self.accelerator, _module_of)

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """The projector, and the UNet if it is trained."""
        rates = {"projector": self.args.lr, "unet": self.args.unet_lr or self.args.lr}
        return optimizer_groups(model, _module_of, rates, self.args.weight_decay)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        """The schedule of `--lr_scheduler`."""
        if self.lr_scheduler is None and self.args.lr_scheduler == DEFAULT_LR_SCHEDULER:
            warmup_steps = int(self.args.warmup_steps)
            self.lr_scheduler = LambdaLR(
                self.create_optimizer() if optimizer is None else optimizer,
                lambda step: log_warmup_linear_decay(step, warmup_steps, num_training_steps),
            )
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    # A step.

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **_: Any) -> Any:
        """Mean loss of one batch of pixels, or of tokens and moments with `cache_latents`."""
        encoded = inputs if self.args.cache_latents else self.encoders(inputs["tower_pixels"], inputs["vae_pixels"])
        random = RandomInputs(**{field.name: inputs[field.name] for field in fields(RandomInputs)})
        latents = sample_latents(self.encoders.vae, encoded["moments"], random.latent_noise)
        weights = inputs["weight"]
        outputs = model(latents=latents, visual_tokens=encoded["visual_tokens"], random=random, weights=weights)
        # Summed over the micro-batches of a step on the device: reading a value would make the host wait.
        sums = torch.stack([outputs["loss"].detach(), weights.mean()]) / self.args.gradient_accumulation_steps
        self._sums = sums if self._sums is None else self._sums + sums
        self._micro_batches += 1
        if self._micro_batches % self.args.gradient_accumulation_steps == 0:
            self.losses.append(self._sums)
            self._sums = None
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def step_losses(self) -> list[float]:
        """Mean loss of each step of this run over all processes, which must all call it."""
        sums = torch.stack([torch.zeros(2, device=self.args.device), *self.losses])  # there may be no step at all
        return [_ratio(*values) for values in self.accelerator.reduce(sums, "mean").tolist()[1:]]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the mean loss over good images, also for the whole run."""
        self.state.epoch = self.samples_seen / self.data["num_images"]
        for name, first in (("loss", self._logged), ("train_loss", 0)):
            if name in logs and self.losses:
                mean = torch.stack(self.losses[first:]).mean(dim=0)
                logs[name] = _ratio(*self.accelerator.reduce(mean, "mean").tolist())
        if "loss" in logs:
            self._logged = len(self.losses)
        super().log(logs, start_time)

    # Checkpoints.

    @property
    def samples_seen(self) -> int:
        """Samples, over all processes, that the steps so far have consumed."""
        return self.batches.samples_after(self.state.global_step * self.args.gradient_accumulation_steps)

    def set_resume_point(self, point: ResumePoint | None) -> None:
        """See [`RunTrainer`]; `trained_rows` are samples."""
        super().set_resume_point(point)
        if point is not None:
            self.batches.resume(point.step * self.args.gradient_accumulation_steps, point.trained_rows)

    def checkpoint_metadata(self) -> dict[str, Any]:
        """The place in the data, and what identifies the data."""
        return {"samples": self.samples_seen, "data": self.data}

    def full_state_dict(self) -> dict[str, Tensor]:
        """See [`RunTrainer`]; the trained weights only."""
        weights = {name: value.detach() for name, value in trainable_parameters(self.plain_model).items()}
        return gather(weights, keep=self.args.should_save)

    def write_weights(self, folder: Path, state_dict: dict[str, Tensor] | None) -> None:
        """Write the trained weights."""
        weights = self.full_state_dict() if state_dict is None else state_dict
        save_file({name: value.contiguous() for name, value in weights.items()}, folder / WEIGHTS_FILE)

    def read_weights(self, folder: str) -> None:
        """Read the file of `write_weights` into a model that may be sharded; other or infinite weights are an error."""
        weights = load_file(Path(folder) / WEIGHTS_FILE)
        check_finite(weights.items(), Path(folder) / WEIGHTS_FILE)
        parameters = trainable_parameters(self.plain_model)
        if differing := sorted(weights.keys() ^ parameters.keys()):
            raise ValueError(
                f"--resume_from_checkpoint {folder} was written by a run that trains other weights "
                f"({len(differing)} differ, for example {differing[0]}); use the same --mode and --unfreeze_unet, or "
                "start a new run in another --output_dir"
            )
        with torch.no_grad():
            for name, value in weights.items():
                if parameters[name].shape != value.shape:
                    raise ValueError(
                        f"--resume_from_checkpoint {folder}: {name} has shape {list(value.shape)} there but "
                        f"{list(parameters[name].shape)} here; use the options it was trained with"
                    )
                parameters[name].copy_(shard_like(value, parameters[name]))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.read_weights(resume_from_checkpoint)
        if self.average is not None:
            self.average.load(Path(resume_from_checkpoint))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Write what Trainer writes on a single process, with every engine, and the moving average."""
        keep = self.args.should_save
        optimizer = gather(self.create_optimizer().state_dict(), keep=keep)
        if keep:
            torch.save(optimizer, Path(output_dir, OPTIMIZER_NAME))
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))
        if self.average is not None:
            self.average.save(Path(output_dir), keep=keep)

    def load_optimizer(self, checkpoint: str | None) -> None:
        """Load the files of `_save_optimizer_and_scheduler` into plain or sharded tensors."""
        if checkpoint is None:
            return
        optimizer = self.create_optimizer()
        state = torch.load(Path(checkpoint, OPTIMIZER_NAME), map_location="cpu", weights_only=True)
        parameters = [value for group in optimizer.param_groups for value in group["params"]]
        for index, values in state["state"].items():
            state["state"][index] = {name: shard_like(value, parameters[index]) for name, value in values.items()}
        optimizer.load_state_dict(state)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint, SCHEDULER_NAME), weights_only=True))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """See [`RunTrainer`]; then draw the validation images, unless a signal leaves little time."""
        self.state.epoch = self.samples_seen / self.data["num_images"]
        super()._save_checkpoint(model, trial)
        is_preempted = self.control.should_training_stop and self.state.global_step < self.state.max_steps
        if self.validation and not is_preempted:
            with self.monitor.pause(), self._finished_model() as finished:
                if self.is_world_process_zero():
                    grid = draw_validation_grid(finished, self.encoders, self.validation, self.args)
                    path = Path(str(self.args.output_dir), "validation", f"step-{self.state.global_step:06d}.png")
                    path.parent.mkdir(parents=True, exist_ok=True)
                    grid.save(path)
                    for tracker in self.trackers:
                        tracker.log_media({}, {"validation": grid}, self.state.global_step)
                self.accelerator.wait_for_everyone()

    # The result.

    def save_result(self) -> None:
        """Write the pipeline folder. All processes must call it."""
        lines = [line for line in self.state.log_history if "loss" in line]
        logged = {name: value for name, value in lines[-1].items() if name != "step"} if lines else {}
        with self._finished_model() as model:
            if self.is_world_process_zero():
                folder = Path(str(self.args.output_dir))
                num_images = self.data["num_images"]
                card = render_visualizer_card(self.args, num_images, self.accelerator.num_processes, logged)
                check_lock(folder)
                with explains_write_errors(folder, "the visualizer"):
                    save_pipeline(folder, model, self.encoders.vae, self.args, card)
                logger.info("Wrote the visualizer to %s", folder)
        self.accelerator.wait_for_everyone()

    @contextmanager
    def _finished_model(self) -> Iterator[Denoiser]:
        """The model with averaged weights, unsharded in the main process. All processes must enter it."""
        model = self.plain_model
        assert isinstance(model, Denoiser)
        keep = self.args.should_save
        if self.is_sharded:
            state = super().full_state_dict()
            if self.average is not None:
                state |= self.average.gather(keep=keep)
            yield unsharded_copy(model, state, self.accelerator.device) if keep else model
        elif self.average is not None:
            with self.average.in_place():
                yield model
        else:
            yield model


def log_warmup_linear_decay(step: int, warmup_steps: int, training_steps: int) -> float:
    """Factor of the peak learning rate at optimizer step `step`, counted from 0.

    It rises as `log(1 + step) / log(1 + warmup_steps)`, then falls linearly to 0 at `training_steps`. The original
    warms up over 4,000 of 16,000 steps, a fixed horizon.
    """
    if step < warmup_steps:
        return math.log1p(step) / math.log1p(warmup_steps)
    if training_steps <= warmup_steps:
        return 1.0
    return max(0.0, (training_steps - step) / (training_steps - warmup_steps))


def _module_of(parameter_name: str) -> str:
    return parameter_name.partition(".")[0]


def _ratio(loss: float, share: float) -> float:
    return loss / share if share else 0.0
