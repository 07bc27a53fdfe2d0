"""Trains the visualizer: arguments → parts → data → trainer → pipeline folder."""

import logging
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from transformers import TrainerCallback, set_seed

from metamorph.models.image_files import load_image
from metamorph.runs.open_run import open_run
from metamorph.runs.preemption import Preemption
from metamorph.training.engines.prepare import configure_fsdp2
from metamorph.training.optimizer import check_optimizer
from metamorph.visualization.pixels import PixelFormat
from metamorph.visualization.token_options import adopt_token_options, load_encoder
from metamorph.visualizer_training.arguments import VisualizerArguments
from metamorph.visualizer_training.build import adopt_resolution, build_projector, check_folders, load_diffusion_parts
from metamorph.visualizer_training.dataset import StreamBatches, VisualizerDataset, collate, encoded
from metamorph.visualizer_training.denoising import Denoiser, FrozenEncoders, RandomInputs
from metamorph.visualizer_training.fsdp2 import layers
from metamorph.visualizer_training.images.bad_images import BadImages
from metamorph.visualizer_training.images.sources import TrainingImages, open_images
from metamorph.visualizer_training.resume import find_resume_point, flags_of_run
from metamorph.visualizer_training.trainer import VisualizerResult, VisualizerTrainer


logger = logging.getLogger(__name__)


def train_visualizer(
    args: VisualizerArguments,
    images: Sequence[Image.Image] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> VisualizerResult:
    """Train a visualizer and write it as a diffusers pipeline to `args.output_dir`.

    While it runs in the main thread, SIGUSR1, SIGTERM and Ctrl-C make it save and stop at the next step. On a CPU, and
    elsewhere with `full_determinism`, PyTorch uses deterministic algorithms; its settings are restored at the end.

    Args:
        images: Images in memory, instead of `image_folder` and `image_jsons`.
        callbacks: Callbacks of Transformers' Trainer, for example to receive what is logged.

    Raises:
        Preempted: If a signal stopped the run.
        Interrupted: If Ctrl-C stopped the run; a checkpoint was saved.
    """
    check_folders(args)
    args = adopt_resolution(adopt_token_options(args))
    if images is None:
        source = open_images(args.image_jsons, args.image_folder)
    elif images:
        source = TrainingImages(images)
    else:
        raise ValueError("images is empty; give at least one image")
    with open_run(args) as preemption:
        return _train(args, source, list(callbacks), preemption)


def _train(
    args: VisualizerArguments, source: TrainingImages, callbacks: list[TrainerCallback], preemption: Preemption
) -> VisualizerResult:
    # 1. Everything that can be checked without weights.
    check_optimizer(args)
    bad_images = BadImages(len(source), args.on_bad_image, args.max_bad_fraction)
    if source.archives is not None:
        if args.process_index == 0:
            source.archives.report()
        bad_images.add_lost(source.archives)
    data = {"num_images": len(source), "digest": source.digest(), "seed": args.seed}
    flags = flags_of_run(args)
    checkpoint, point = find_resume_point(args, flags, data)
    validation = [load_image(Path(name).expanduser()) for name in args.validation_images]

    # 2. The parts, and what is trained of them.
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    encoder = load_encoder(args)
    set_seed(args.seed)
    unet, vae, scheduler = load_diffusion_parts(args, vae_dtype=dtype)
    token_shape = (encoder.config.num_image_tokens, encoder.num_features)
    projector = build_projector(args, token_shape, unet.config.cross_attention_dim)
    encoder.tower.to(args.device, dtype)  # diffusers' own `to` warns about precisions
    encoders = FrozenEncoders(encoder, vae.to(args.device))
    model = Denoiser(projector, unet.requires_grad_(args.unfreeze_unet), scheduler, args.snr_gamma)
    _prepare_engine(args, model)

    # 3. The data.
    assert args.resolution is not None  # adopt_resolution has set it
    formats = encoder.pixel_format, PixelFormat(args.resolution)
    images = VisualizerDataset(source, *formats, bad_images, args.random_crop, args.seed)
    num_batches = args.training_steps * args.gradient_accumulation_steps
    side = unet.config.sample_size
    random_inputs = partial(
        RandomInputs.at,
        latent_shape=(vae.config.latent_channels, side, side),
        seed=args.seed,
        num_timesteps=scheduler.config.num_train_timesteps,
        timestep_power=args.timestep_power,
        cfg_prob=args.cfg_prob,
        noise_offset=args.noise_offset,
    )

    # 4. Training.
    with encoded(images, encoders, args) if args.cache_latents else nullcontext(images) as dataset:
        trainer = VisualizerTrainer(
            encoders=encoders,
            validation=validation,
            data=data,
            batches=StreamBatches(
                len(source), args.batch_size, num_batches, args.seed, args.process_index, args.world_size
            ),
            model=model,
            args=args,
            train_dataset=dataset,
            data_collator=partial(collate, random_inputs=random_inputs),
            callbacks=callbacks,
        )
        trainer.flags = flags
        began = time.perf_counter()
        trainer.run(checkpoint, point, bad_images, preemption)
        seconds = time.perf_counter() - began

    # 5. The result.
    losses = trainer.step_losses()
    trainer.save_result()
    return VisualizerResult(
        Path(str(args.output_dir)), losses, 0 if point is None else point.step, seconds, trainer.is_world_process_zero()
    )


def _prepare_engine(args: VisualizerArguments, model: Denoiser) -> None:
    """Compile and shard layer by layer; an unsharded UNet on a GPU gets the layout for its convolutions."""
    counts = [sum(value.numel() for value in model.parameters() if value.requires_grad or frozen) for frozen in (0, 1)]
    logger.info("Training %.2f of %.2f million parameters", *(count / 1e6 for count in counts))
    if args.torch_compile:
        for layer in layers(model):
            layer.compile(backend=args.torch_compile_backend or "inductor", mode=args.torch_compile_mode)
    if args.fsdp:
        configure_fsdp2(args, sorted({type(layer).__name__ for layer in layers(model)}))
    elif args.device.type == "cuda":  # FSDP2 shards contiguous parameters only; on a CPU this trains no faster
        model.unet.to(memory_format=torch.channels_last)
