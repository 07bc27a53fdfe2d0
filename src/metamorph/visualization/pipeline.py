"""Visual tokens to images: projector, UNet, VAE and a noise scheduler as one diffusers pipeline."""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, DPMSolverMultistepScheduler, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from metamorph.files.model_files import check_finite
from metamorph.visualization.encoder import VisualTokenEncoder
from metamorph.visualization.folders import check_visualizer, local_folder
from metamorph.visualization.guidance import GuidedBatch
from metamorph.visualization.projector import VisualizationProjector, pad_condition


Generators = torch.Generator | list[torch.Generator] | None


class VisualizationPipeline(DiffusionPipeline):
    """Draw images from visual tokens.

    The pipeline contains everything between tokens and pixels: projection, padding of the condition, classifier-free
    guidance against the all-zero condition that training used for dropped samples, sampling and decoding. A folder
    written by `metamorph train-visualizer` or `save_pretrained` loads with
    `VisualizationPipeline.from_pretrained(folder)`.

    Args:
        projector: Visual tokens `[images, N, D]` to condition tokens.
        unet: Noise predictor whose `cross_attention_dim` is the projector's `output_dim`.
        vae: Latents to pixels.
        scheduler: Any diffusers scheduler of the UNet's prediction type; `from_parts` uses DPM-Solver.
        vision_tower: Encodes images for calls with `images`. Optional in a folder.
    """

    model_cpu_offload_seq = "vision_tower->projector->unet->vae"
    _optional_components = ["vision_tower"]

    def __init__(
        self,
        projector: VisualizationProjector,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        scheduler: SchedulerMixin,
        vision_tower: VisualTokenEncoder | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(projector=projector, unet=unet, vae=vae, scheduler=scheduler, vision_tower=vision_tower)
        self.image_processor = VaeImageProcessor(vae_scale_factor=vae_scale_factor(vae.config))
        self.set_progress_bar_config(disable=None)  # show the bar on a terminal only

    @classmethod
    def from_parts(
        cls,
        projector: VisualizationProjector,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        noise_scheduler: SchedulerMixin,
        vision_tower: VisualTokenEncoder | None = None,
    ) -> "VisualizationPipeline":
        """Compose a pipeline that samples with DPM-Solver on the noise schedule of `noise_scheduler`."""
        scheduler = DPMSolverMultistepScheduler.from_config(noise_scheduler.config)
        return cls(projector=projector, unet=unet, vae=vae, scheduler=scheduler, vision_tower=vision_tower)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> "VisualizationPipeline":
        """Check a folder or Hub id, and load it as diffusers does.

        It may hold parts of a visualizer and no code, and exactly the weights of its configuration; anything else is a
        `ValueError`. Options are those of diffusers, without `custom_pipeline` and `trust_remote_code`.
        """
        for name in ("custom_pipeline", "trust_remote_code"):
            if kwargs.pop(name, None):
                raise ValueError(f"{name} is not supported: code that comes with a visualizer is never run")
        folder = local_folder(pretrained_model_name_or_path, **kwargs)
        check_visualizer(folder, given=frozenset(kwargs), variant=kwargs.get("variant"))
        kwargs |= {"use_safetensors": True, "trust_remote_code": False}
        if kwargs.get("torch_dtype") in (None, torch.float32):  # diffusers' default; it warns that the name is old
            kwargs.pop("torch_dtype", None)
        pipeline = super().from_pretrained(str(folder), **kwargs)
        for name, module in pipeline.components.items():
            if isinstance(module, torch.nn.Module):
                check_finite(module.state_dict().items(), folder / name)
        return pipeline

    def compile(self, **options: Any) -> "VisualizationPipeline":
        """Compile UNet, VAE decoder and projector in place, with options of `torch.compile`; returns the pipeline.

        The first call, and the first with another number of images, takes long.
        """
        for module in (self.projector, self.unet, self.vae.decoder):
            module.compile(**options)
        return self

    @torch.no_grad()
    def __call__(
        self,
        visual_tokens: torch.Tensor | None = None,
        guidance_scale: float | Sequence[float] = 3.0,
        num_inference_steps: int = 20,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        images: Image.Image | Sequence[Image.Image] | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Draw each image of `visual_tokens` at each guidance scale, all in one batch of the UNet.

        Args:
            visual_tokens: `[images, N, D]`, or `[N, D]` for one image.
            guidance_scale: Strength w of guidance: `zero + w · (condition − zero)`. 1 switches it off and halves the
                cost. Several scales draw every image at every scale, from the same noise: the result then is image 1
                at each scale, image 2 at each scale, and so on.
            num_inference_steps: Steps of the sampler.
            generator: Source of the starting noise. With a list of one generator per image, a drawing does not depend
                on the batch it is drawn in.
            latents: Starting noise `[images, channels, height, width]` instead.
            output_type: `pil`, `np` (`[images, height, width, 3]` in 0..1), `pt` (`[images, 3, height, width]` in 0..1)
                or `latent`.
            return_dict: False returns the tuple `(images,)`.
            images: Images to reconstruct, instead of `visual_tokens`: the pipeline's vision tower encodes their central
                squares.
        """
        scales = [guidance_scale] if isinstance(guidance_scale, (int, float)) else list(guidance_scale)
        if not scales:
            raise ValueError("guidance_scale is an empty list; give one number or more.")
        visual_tokens = self._visual_tokens(visual_tokens, images)
        latents = self._starting_latents(visual_tokens.shape[0], generator, latents)
        if visual_tokens.shape[0]:  # an answer in words alone has no images
            if len(scales) > 1 and isinstance(generator, list):
                # A stochastic sampler gives all scales of an image the same noise.
                generator = [each.clone_state() for each in generator for _ in scales]
            batch = GuidedBatch(self._condition(visual_tokens), scales)
            latents = self._denoise(batch, latents, num_inference_steps, generator)
        drawn = self._decode(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=drawn) if return_dict else (drawn,)

    def _visual_tokens(
        self, visual_tokens: torch.Tensor | None, images: Image.Image | Sequence[Image.Image] | None
    ) -> torch.Tensor:
        if (visual_tokens is None) == (images is None):
            raise ValueError("give either visual_tokens or images")
        if visual_tokens is None:
            if self.vision_tower is None:
                raise ValueError(
                    "this visualizer has no vision tower, so it cannot encode images: give visual_tokens, load it "
                    "with vision_tower=…, or train it with --save_vision_tower True"
                )
            return self.vision_tower.encode_images([images] if isinstance(images, Image.Image) else images)
        return visual_tokens.unsqueeze(0) if visual_tokens.dim() == 2 else visual_tokens

    def _condition(self, visual_tokens: torch.Tensor) -> torch.Tensor:
        """`[images, N, D]` to the padded condition `[images, >= 77, cross_attention_dim]`."""
        tokens = visual_tokens.to(device=self._execution_device, dtype=self.projector.dtype)
        return pad_condition(self.projector(tokens)).to(self.unet.dtype)

    def _starting_latents(self, num_images: int, generator: Generators, latents: torch.Tensor | None) -> torch.Tensor:
        """Noise `[images, channels, height, width]` at the level at which the scheduler starts."""
        sample_size = self.unet.config.sample_size
        sides = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
        shape = (num_images, self.unet.config.in_channels, *sides)
        if isinstance(generator, list) and len(generator) != num_images:
            raise ValueError(
                f"{len(generator)} generators for {num_images} images; give one generator, or one per image."
            )
        if latents is None:
            source = generator or None  # there may be no images
            latents = randn_tensor(shape, generator=source, device=self._execution_device, dtype=self.unet.dtype)
        elif latents.shape != shape:
            raise ValueError(f"latents have shape {list(latents.shape)}, but the UNet takes {list(shape)} here.")
        return latents.to(device=self._execution_device, dtype=self.unet.dtype)

    def _denoise(
        self, batch: GuidedBatch, latents: torch.Tensor, num_inference_steps: int, generator: Generators
    ) -> torch.Tensor:
        """From noise `[images, …]` to clean latents `[images · scales, …]`."""
        self.scheduler.set_timesteps(num_inference_steps, device=latents.device)
        latents = batch.start(latents * self.scheduler.init_noise_sigma)
        # Only stochastic samplers add noise in a step.
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        step_options = {"generator": generator} if takes_generator else {}

        with self.progress_bar(total=num_inference_steps) as progress:
            for index, timestep in enumerate(self.scheduler.timesteps):
                scaled = self.scheduler.scale_model_input(latents, timestep)
                noisy, condition = batch.inputs(scaled, index == 0)  # one row per prediction
                prediction = self.unet(noisy, timestep, encoder_hidden_states=condition).sample
                prediction = batch.combine(prediction, index == 0)
                latents = self.scheduler.step(prediction, timestep, latents, **step_options).prev_sample
                progress.update()
        return latents

    def _decode(self, latents: torch.Tensor, output_type: str) -> torch.Tensor | np.ndarray | list[Image.Image]:
        if output_type == "latent":
            return latents
        if latents.shape[0]:
            pixels = self.vae.decode(from_unet_latents(self.vae, latents).to(self.vae.dtype)).sample
        else:  # which the VAE does not take
            factor = vae_scale_factor(self.vae.config)
            pixels = latents.new_empty(0, 3, *(side * factor for side in latents.shape[2:]))
        return self.image_processor.postprocess(pixels, output_type=output_type)


def vae_scale_factor(config: Mapping[str, Any]) -> int:
    """Pixels per latent along one side of the image, by the configuration of an `AutoencoderKL`."""
    return 2 ** (len(config["block_out_channels"]) - 1)


def to_unet_latents(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Scale the VAE's latents to unit variance, as the UNet takes them."""
    return (latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


def from_unet_latents(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Undo `to_unet_latents`."""
    return latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
