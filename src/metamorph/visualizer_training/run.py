"""Trains the visualizer: arguments → parts → data → trainer → pipeline folder."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers import TrainerCallback, set_seed

from metamorph.runs.open_run import open_run
from metamorph.runs.preemption import Preemption
from metamorph.training.engines.prepare import configure_fsdp2
from metamorph.training.optimizer import check_optimizer
from metamorph.training.reporting.progress import ShowProgress
from metamorph.visualization.pixels import PixelFormat
from metamorph.visualization.token_options import adopt_token_options, load_tower
from metamorph.visualizer_training.alignment import align_projector, load_conditions
from metamorph.visualizer_training.arguments import VisualizerArguments
from metamorph.visualizer_training.build import (
    DiffusionParts,
    adopt_resolution,
    build_projector,
    check_folders,
    load_diffusion_parts,
    token_shape,
)
from metamorph.visualizer_training.dataset import (
    DrawingCollator,
    StreamBatches,
    TensorDataset,
    VisualizerDataset,
    encode_all,
)
from metamorph.visualizer_training.denoising import Denoiser, FrozenEncoders
from metamorph.visualizer_training.fsdp2 import layers
from metamorph.visualizer_training.pictures.bad_pictures import BadPictures
from metamorph.visualizer_training.pictures.shards import report_shards
from metamorph.visualizer_training.pictures.sources import (
    ImageFiles,
    ImageList,
    ImageSource,
    open_pictures,
    shards_of,
)
from metamorph.visualizer_training.resume import find_resume_point, flags_of_run
from metamorph.visualizer_training.trainer import StepCallback, VisualizerResult, VisualizerTrainer


logger = logging.getLogger(__name__)

__all__ = ["StepCallback", "VisualizerResult", "VisualizerTrainer", "open_source", "train_visualizer"]


def train_visualizer(
    args: VisualizerArguments,
    images: Sequence[Image.Image] | None = None,
    on_log: StepCallback | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> VisualizerResult:
    """Train a visualizer and write it as a diffusers pipeline to `args.output_dir`.

    While it runs in the main thread, SIGUSR1, SIGTERM and Ctrl-C let it save and stop at the next step. On a CPU, and
    elsewhere with `full_determinism`, PyTorch computes with deterministic algorithms; its settings are restored at the
    end.

    Args:
        args: The flags.
        images: Pictures in memory, in place of `image_folder` and `image_jsons`.
        on_log: Called in the main process every `logging_steps` steps and after the last one, in place of log lines.
        callbacks: Of Transformers' Trainer, for example a progress display.

    Raises:
        ValueError: for parts, data or checkpoints that do not fit, or another run in the output folder, before training
            starts.
        Preempted: if a signal has stopped it.
        Interrupted: if Ctrl-C has; a checkpoint was saved.
    """
    check_folders(args)
    args = adopt_resolution(adopt_token_options(args))
    source = open_source(args, images)
    if on_log is not None:
        callbacks = [*callbacks, ShowProgress(VisualizerTrainer.title, log_entries=False)]
    with open_run(args) as preemption:
        return _train(args, source, list(callbacks), on_log, preemption)


def _train(
    args: VisualizerArguments,
    source: ImageSource,
    callbacks: list[TrainerCallback],
    on_log: StepCallback | None,
    preemption: Preemption,
) -> VisualizerResult:
    # 1. Everything that can be checked without weights.
    check_optimizer(args)
    bad_pictures = BadPictures(len(source), args.on_bad_image, args.max_bad_fraction)
    shards = shards_of(source)
    if shards is not None:
        if args.process_index == 0:
            report_shards(shards.shards)
        bad_pictures.add_lost(shards)
    data = {"pictures": len(source), "digest": source.digest(), "seed": args.seed}
    flags = flags_of_run(args)
    checkpoint, point = find_resume_point(args, flags, data)
    files = ImageFiles(tuple(Path(name).expanduser() for name in args.validation_images))
    validation = [files.load(index) for index in range(len(files))]
    conditions = None if args.alignment_conditions is None else load_conditions(args.alignment_conditions, len(source))

    # 2. The parts, and what is trained of them.
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    tower, tower_format = load_tower(args)
    set_seed(args.seed)
    parts = load_diffusion_parts(args, vae_dtype=dtype)
    projector = build_projector(args, token_shape(tower, tower_format), parts.unet.config.cross_attention_dim)
    encoders = FrozenEncoders(tower.to(args.device, dtype), parts.vae.to(args.device))
    parts.unet.requires_grad_(args.unfreeze_unet)
    model = Denoiser(projector, parts.unet, parts.noise_scheduler, args.snr_gamma)
    _prepare_engine(args, model)

    # 3. The data.
    pictures = VisualizerDataset(
        source, tower_format, PixelFormat(parts.resolution), args.random_crop, args.seed, bad_pictures
    )
    dataset: Dataset = pictures
    if args.cache_latents:
        dataset = encode_all(pictures, encoders, args.batch_size, args.dataloader_num_workers, args.device)

    # 4. Training.
    trainer = VisualizerTrainer(
        parts=parts,
        encoders=encoders,
        tower_format=tower_format,
        validation=validation,
        data=data,
        on_log=on_log,
        batches=StreamBatches(
            len(source),
            args.batch_size,
            args.seed,
            rank=args.process_index,
            world_size=args.world_size,
            num_batches=args.training_steps * args.gradient_accumulation_steps,
        ),
        model=model,
        args=args,
        train_dataset=dataset,
        data_collator=_collator(args, parts),
        callbacks=callbacks,
    )
    trainer.flags = flags
    if conditions is not None and point is None:
        assert isinstance(dataset, TensorDataset)  # the flags demand cache_latents
        tokens, lr = dataset.tensors["visual_tokens"], args.alignment_lr
        align_projector(projector, tokens, conditions, steps=args.alignment_steps, lr=lr, seed=args.seed)
    began = time.perf_counter()
    trainer.run(checkpoint, point, bad_pictures, preemption)
    seconds = time.perf_counter() - began

    # 5. The result.
    losses = trainer.step_losses()
    trainer.save_result()
    return VisualizerResult(
        Path(str(args.output_dir)), losses, 0 if point is None else point.step, seconds, trainer.is_world_process_zero()
    )


def open_source(args: VisualizerArguments, images: Sequence[Image.Image] | None = None) -> ImageSource:
    """The pictures that the flags name.

    Raises:
        ValueError: if there are none.
    """
    if images is not None:
        if not images:
            raise ValueError("images is empty; give at least one picture")
        return ImageList(images)
    return open_pictures(args.image_jsons, args.image_folder)


def _prepare_engine(args: VisualizerArguments, model: Denoiser) -> None:
    """Compile and shard layer by layer."""
    counts = [sum(value.numel() for value in model.parameters() if value.requires_grad or frozen) for frozen in (0, 1)]
    logger.info("Training %.2f of %.2f million parameters", *(count / 1e6 for count in counts))
    if args.torch_compile:
        for layer in layers(model):
            layer.compile(backend=args.torch_compile_backend or "inductor", mode=args.torch_compile_mode)
        # Trainer would compile the whole model around them once more.
        args.torch_compile, args.torch_compile_backend, args.torch_compile_mode = False, None, None
    if args.fsdp:
        configure_fsdp2(args, sorted({type(layer).__name__ for layer in layers(model)}))


def _collator(args: VisualizerArguments, parts: DiffusionParts) -> DrawingCollator:
    side = parts.unet.config.sample_size
    options = {
        "seed": args.seed,
        "num_timesteps": parts.noise_scheduler.config.num_train_timesteps,
        "timestep_power": args.timestep_power,
        "cfg_prob": args.cfg_prob,
        "noise_offset": args.noise_offset,
    }
    return DrawingCollator((parts.vae.config.latent_channels, side, side), options)
