"""The loop of the visualizer's trainer: parts, optimizer, steps, checkpoints and the result."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.training_utils import EMAModel
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset

from metamorph.runs.checkpoint_files import explains_write_errors
from metamorph.runs.lock import check_lock
from metamorph.runs.preemption import Preemption, ignore_signals, leave
from metamorph.runs.progress import Progress, log_line
from metamorph.visualization.pixels import PixelFormat
from metamorph.visualization.projector import VisualizationProjector
from metamorph.visualization.token_options import load_tower
from metamorph.visualizer_training.alignment import align_projector, load_conditions
from metamorph.visualizer_training.arguments import VisualizerArguments
from metamorph.visualizer_training.build import DiffusionParts, build_projector, load_diffusion_parts, token_shape
from metamorph.visualizer_training.checkpoints import TrainingState, save_checkpoint, trainable_parameters
from metamorph.visualizer_training.dataset import Sample, StreamBatches, TensorDataset, VisualizerDataset
from metamorph.visualizer_training.denoising import (
    ConditionedUNet,
    Draws,
    FrozenEncoders,
    diffusion_loss,
    sample_latents,
)
from metamorph.visualizer_training.export import draw_validation_grid, save_pipeline
from metamorph.visualizer_training.fsdp2 import layers, shard, whole, whole_copy
from metamorph.visualizer_training.model_card import render_visualizer_card
from metamorph.visualizer_training.monitor import RunMonitor
from metamorph.visualizer_training.pictures.bad_pictures import BadPictures
from metamorph.visualizer_training.pictures.sources import ImageFiles, ImageSource
from metamorph.visualizer_training.resume_flags import flags_of_run
from metamorph.visualizer_training.schedule import build_lr_scheduler


logger = logging.getLogger(__name__)

StepCallback = Callable[[int, dict[str, float]], None]
"""Called at each log entry with the number of steps done and the logged values."""


@dataclass(frozen=True)
class VisualizerResult:
    """What a run of the trainer leaves."""

    output_dir: Path
    """Pipeline folder: `VisualizationPipeline.from_pretrained(output_dir)`."""
    losses: list[float]
    """Mean loss of each optimizer step of this run, over all processes."""
    first_step: int
    """Steps that were done before this run (0 unless resumed)."""
    seconds: float
    """Duration of the training loop."""
    is_main_process: bool
    """Whether this process is the one that writes and reports."""


class VisualizerTrainer:
    """The parts of a run and its loop.

    Args:
        args: The flags.
        source: Pictures.
        bad_pictures: Counts those that cannot be read.
        accelerator: Device, precision and processes.
        preemption: Catches the signals.
        on_log: See `train_visualizer`.
    """

    def __init__(
        self,
        args: VisualizerArguments,
        source: ImageSource,
        bad_pictures: BadPictures,
        accelerator: Accelerator,
        preemption: Preemption,
        on_log: StepCallback | None = None,
    ) -> None:
        self.args, self.accelerator, self.on_log = args, accelerator, on_log
        self.preemption, self.bad_pictures = preemption, bad_pictures
        self.output_dir = Path(args.output_dir).expanduser()
        files = ImageFiles(tuple(Path(name).expanduser() for name in args.validation_images))
        self.validation = [files.load(index) for index in range(len(files))]  # now: an unreadable one ends no long run
        self.num_images = len(source)
        self._logged: dict[str, float] = {}

        dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
        tower, self.tower_format = load_tower(args)
        set_seed(args.seed)
        self.parts = load_diffusion_parts(args, vae_dtype=dtype)
        self.projector = build_projector(
            args, token_shape(tower, self.tower_format), self.parts.unet.config.cross_attention_dim
        )
        device = accelerator.device
        self.encoders = FrozenEncoders(tower.to(device, dtype), self.parts.vae.to(device))
        self.dataset: Dataset = VisualizerDataset(
            source, self.tower_format, PixelFormat(self.parts.resolution), args.random_crop, args.seed, bad_pictures
        )
        if args.cache_latents:
            self.dataset = self._encode_all()
        self.state = self._build_state()
        self.state.data = {"pictures": len(source), "digest": source.digest(), "seed": args.seed}
        self.state.flags = flags_of_run(args)

    def _build_state(self) -> TrainingState:
        """Freeze what is not trained, build the optimizer, wrap for the processes."""
        args, unet = self.args, self.parts.unet
        unet.requires_grad_(args.unfreeze_unet)
        if args.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        model = self.model = ConditionedUNet(self.projector, unet).train().to(self.accelerator.device)
        if args.torch_compile:
            for layer in layers(model):
                layer.compile()
        is_divided = args.sharding == "fsdp2" and self.accelerator.num_processes > 1
        if is_divided:
            shard(model, bf16=self.accelerator.mixed_precision == "bf16")
        elif args.sharding == "fsdp2":
            logger.warning("--sharding fsdp2 has nothing to divide in a single process")
        groups = [{"params": list(self.projector.parameters()), "lr": args.lr}]
        if args.unfreeze_unet:
            groups.append({"params": list(unet.parameters()), "lr": args.unet_lr or args.lr})
        optimizer = torch.optim.AdamW(groups, weight_decay=args.weight_decay)
        # Not prepared by Accelerate, which would advance it once per process.
        lr_scheduler = build_lr_scheduler(
            args.lr_scheduler, optimizer, warmup_steps=args.warmup_steps, training_steps=args.training_steps
        )
        optimizer = self.accelerator.prepare(optimizer)
        self.wrapped_model = model if is_divided else self.accelerator.prepare(model)
        self.parameters = list(trainable_parameters(model).values())
        ema = EMAModel(self.parameters, decay=args.ema_decay) if args.ema_decay else None
        logger.info(
            "Training %.2f of %.2f million parameters on %d pictures",
            sum(value.numel() for value in self.parameters) / 1e6,
            sum(value.numel() for value in model.parameters()) / 1e6,
            self.num_images,
        )
        return TrainingState(model, optimizer, lr_scheduler, ema)

    def align(self, file: str) -> None:
        """Fit the projector to the known conditions in `file`; every process does the same."""
        conditions = load_conditions(file, self.num_images)
        assert isinstance(self.dataset, TensorDataset)  # the flags demand cache_latents
        tokens = self.dataset.tensors["visual_tokens"]
        steps, lr = self.args.alignment_steps, self.args.alignment_lr
        align_projector(self.projector, tokens, conditions, steps=steps, lr=lr, seed=self.args.seed)
        if self.state.ema is not None:  # the average starts from here
            self.state.ema = EMAModel(self.parameters, decay=self.args.ema_decay)

    def train(self) -> VisualizerResult:
        """Run the loop to `training_steps` and write the result.

        Raises:
            Preempted: on all processes, if one of them got a signal; a checkpoint and the marker have been written.
            Interrupted: on all processes after Ctrl-C; a checkpoint has been written.
        """
        args, state = self.args, self.state
        first_step = state.step
        monitor = self.monitor = RunMonitor(self.accelerator, self._samples_per_step)
        batches = iter(self._loader(state.samples_seen))
        self.preemption.catch_interrupt()
        with Progress(desc="visualizer", total=args.training_steps, unit="step", initial=first_step) as progress:
            while state.step < args.training_steps:
                self._optimizer_step(batches)
                progress.update()
                if state.step % args.logging_steps == 0 or state.step == args.training_steps:
                    self._log(progress)
                if state.step < args.training_steps and self.preemption.agreed():
                    folder = self._save_checkpoint(validate=False)  # time is short
                    leave(
                        self.preemption,
                        state.step,
                        folder,
                        self.output_dir,
                        is_main=self.accelerator.is_main_process,
                        trackers=self.accelerator.trackers,
                    )
                if args.save_step and state.step % args.save_step == 0:
                    with monitor.pause():
                        self._save_checkpoint()
        seconds = monitor.seconds
        losses = monitor.losses()
        self._save_result()
        # Not Accelerate's `end_training`, which destroys the process group as well: gloo's threads need the interpreter
        # lock to let go of a reduced tensor, and destroying the group waits for them while holding it. The group goes
        # with the process, as Transformers' Trainer leaves it too.
        for tracker in self.accelerator.trackers:
            tracker.finish()
        return VisualizerResult(self.output_dir, losses, first_step, seconds, self.accelerator.is_main_process)

    def _optimizer_step(self, batches: Iterator[dict[str, torch.Tensor]]) -> None:
        """Forward and backward over the accumulated batches, then one update."""
        args, state = self.args, self.state
        sums = torch.zeros(2, device=self.accelerator.device)
        for index in range(args.gradient_accumulation_steps):
            is_last = index == args.gradient_accumulation_steps - 1
            with nullcontext() if is_last else self._no_sync():
                batch = self.monitor.fetch(batches)
                share = batch["weight"].mean()
                loss = self._loss(batch) / args.gradient_accumulation_steps
                self.accelerator.backward(loss)
            sums += torch.stack([loss.detach(), share.to(loss.device) / args.gradient_accumulation_steps])
        norm = None
        if args.max_grad_norm:
            norm = self.accelerator.clip_grad_norm_(self.parameters, args.max_grad_norm)
            norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        state.optimizer.step()
        state.lr_scheduler.step()
        state.optimizer.zero_grad(set_to_none=True)
        if state.ema is not None:
            state.ema.step(self.parameters)
        state.step += 1
        state.samples_seen += self._samples_per_step
        self.monitor.add(sums, norm)

    def _loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Mean loss of one batch of pixels, or of tokens and moments with `cache_latents`."""
        args, device = self.args, self.accelerator.device
        positions, weights = batch.pop("position"), batch.pop("weight").to(device)
        batch = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
        encoded = batch if args.cache_latents else self.encoders(**batch)
        moments = encoded["moments"]
        draws = Draws.at(
            positions,
            (moments.shape[1] // 2, *moments.shape[2:]),
            seed=args.seed,
            num_timesteps=self.parts.noise_scheduler.config.num_train_timesteps,
            timestep_power=args.timestep_power,
            cfg_prob=args.cfg_prob,
            noise_offset=args.noise_offset,
        ).to(device)
        latents = sample_latents(self.encoders.vae, moments, draws.latent_noise)
        with self.accelerator.autocast():
            return diffusion_loss(
                self.wrapped_model,
                self.parts.noise_scheduler,
                latents,
                encoded["visual_tokens"],
                draws,
                args.snr_gamma,
                weights,
            )

    @property
    def _samples_per_step(self) -> int:
        return self.args.batch_size * self.args.gradient_accumulation_steps * self.accelerator.num_processes

    def _loader(self, start: int) -> DataLoader:
        batches = StreamBatches(
            self.num_images,
            self.args.batch_size,
            self.args.seed,
            start,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
        )
        workers = self.args.dataloader_num_workers
        return DataLoader(
            self.dataset,
            batch_sampler=batches,
            num_workers=workers,
            pin_memory=self.accelerator.device.type == "cuda",
            persistent_workers=workers > 0,
            worker_init_fn=ignore_signals,
        )

    def _encode_all(self) -> TensorDataset:
        """Tokens and latents of every picture, on the CPU."""
        size, count, chunks = self.args.batch_size, self.num_images, []
        order = [[Sample(i, i) for i in range(at, min(at + size, count))] for at in range(0, count, size)]
        loader = DataLoader(
            self.dataset,
            batch_sampler=order,
            num_workers=self.args.dataloader_num_workers,
            worker_init_fn=ignore_signals,
        )
        for batch in Progress(loader, "encoding pictures", unit="batch"):
            pixels = {name: batch[name].to(self.accelerator.device) for name in ("tower_pixels", "vae_pixels")}
            encoded = {name: value.cpu() for name, value in self.encoders(**pixels).items()}
            chunks.append({**encoded, "weight": batch["weight"]})
        return TensorDataset({name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]})

    def _log(self, progress: Progress) -> None:
        """Report what happened since the last entry; the only place in the loop that waits for the device."""
        values = self.monitor.entry(self.state.lr_scheduler.get_last_lr()[0])
        self.bad_pictures.merge(self.accelerator.device)
        if self.bad_pictures.num_bad:
            values["bad_pictures"] = self.bad_pictures.num_bad
        self._logged = values
        progress.set_postfix(loss=f"{values['loss']:.3f}")
        self.accelerator.log(values, step=self.state.step)
        if not self.accelerator.is_main_process:
            return
        told = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        logger.debug("step %d, all values: %s", self.state.step, told)
        if self.on_log is not None:
            self.on_log(self.state.step, values)
        else:
            epoch = self.state.samples_seen / self.num_images
            rate = values["samples_per_second"]
            progress.say(log_line(progress, epoch, values["loss"], values["lr"], rate, "samples"))

    @contextmanager
    def _no_sync(self) -> Iterator[None]:
        """Within, gradients stay on their processes."""
        model = self.model
        if not isinstance(model, FSDPModule):
            with self.accelerator.no_sync(self.wrapped_model):
                yield
            return
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)

    def _save_checkpoint(self, validate: bool = True) -> Path:
        is_main = self.accelerator.is_main_process
        folder = save_checkpoint(self.output_dir, self.state, self.args.save_total_limit, writes=is_main)
        if is_main:
            logger.info("Wrote %s", folder)
        if validate and self.validation:
            with self._finished_parts() as finished:
                if is_main:
                    self._validate(*finished)
        self.accelerator.wait_for_everyone()
        return folder

    def _validate(self, projector: VisualizationProjector, parts: DiffusionParts) -> None:
        """Draw the validation pictures from their tokens, to a file and to the trackers."""
        grid = draw_validation_grid(
            projector,
            parts,
            self.encoders,
            self.validation,
            self.tower_format,
            self.args,
        )
        path = self.output_dir / "validation" / f"step-{self.state.step:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        grid.save(path)
        for tracker in self.accelerator.trackers:
            # TensorBoard takes channels to come first unless it is told; wandb has no such option.
            options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"validation": np.asarray(grid)[None]}, step=self.state.step, **options)

    def _save_result(self) -> None:
        with self._finished_parts() as (projector, parts):
            if self.accelerator.is_main_process:
                card = render_visualizer_card(self.args, self.num_images, self.accelerator.num_processes, self._logged)
                check_lock(self.output_dir)
                with explains_write_errors(self.output_dir, "the visualizer"):
                    save_pipeline(self.output_dir, projector, parts, self.args, card)
                logger.info("Wrote the visualizer to %s", self.output_dir)
        self.accelerator.wait_for_everyone()

    @contextmanager
    def _finished_parts(self) -> Iterator[tuple[VisualizationProjector, DiffusionParts]]:
        """Projector and parts with the moving average of the weights, whole in the main process. For all processes."""
        model, ema = self.model, self.state.ema
        if isinstance(model, FSDPModule):
            is_main = self.accelerator.is_main_process
            state = whole(model.state_dict(), keep=is_main)
            if ema is not None:
                names = trainable_parameters(model)
                state |= zip(names, whole(ema.shadow_params, keep=is_main), strict=True)
            if is_main:
                model = whole_copy(self.model, state, self.accelerator.device)
            yield model.projector, replace(self.parts, unet=model.unet)
            return
        if ema is not None:
            ema.store(self.parameters)
            ema.copy_to(self.parameters)
        try:
            yield self.projector, self.parts
        finally:
            if ema is not None:
                ema.restore(self.parameters)
