"""A model and its visualizer in one object: `metamorph.load("mini", "mini").reply("Draw a red circle").images[0]`."""

import copy
import dataclasses
import itertools
import logging
import threading
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import BitsAndBytesConfig, CompileConfig

from metamorph.flags.checks import check_metamorph_model, check_reachable, errors_name_flag
from metamorph.flags.extras import install_command
from metamorph.inference.chat import Chat
from metamorph.inference.draw import SamplerSettings, draw, draw_each
from metamorph.inference.prompt import Images, Prompt, open_images, place_media
from metamorph.inference.reply import Reply, reply_to
from metamorph.inference.streaming import OnPart, Part, stream_parts
from metamorph.mini import shipped_folder
from metamorph.models.adapters import (
    PARTS_NOT_QUANTISED,
    is_adapter_folder,
    read_adapter_base,
    require_bitsandbytes,
)
from metamorph.models.modeling_metamorph import MetaMorphForConditionalGeneration
from metamorph.models.processing_metamorph import ImagePart, MetaMorphProcessor


if TYPE_CHECKING:
    from metamorph.visualization.pipeline import VisualizationPipeline  # needs diffusers, which is an extra


logger = logging.getLogger(__name__)


@dataclass
class Session:
    """A loaded model: answers prompts and draws the images of the answers."""

    model: MetaMorphForConditionalGeneration
    processor: MetaMorphProcessor
    pipeline: "VisualizationPipeline | None" = None
    """Draws visual tokens; None leaves images undrawn."""

    @property
    def visualizer(self) -> "VisualizationPipeline":
        """The pipeline; a ValueError if there is none."""
        if self.pipeline is None:
            raise ValueError("there is no visualizer: give one to metamorph.load")
        return self.pipeline

    def reply(
        self,
        prompt: str | Sequence[Mapping[str, Any]],
        images: Images = (),
        *,
        draw: bool = False,
        settings: SamplerSettings | None = None,
        **options: Any,
    ) -> Reply:
        """Answer one prompt, and draw the images of the answer.

        Args:
            prompt: The user's turn, with an `<image>` marker where each image belongs. Without markers the images
                come first. Or a conversation: messages as in `apply_chat_template`.
            images: PIL images or files; one, or several.
            draw: Begin the answer with an image, however the model would begin it.
            settings: How the visualizer draws. The first image has its seed, the second the next one.
            **options: Fields of [`Prompt`], such as `sampling=Sampling(temperature=0.7, seed=1)`, or arguments for
                `model.generate`, for example `max_new_tokens=500`.
        """
        opened = open_images(images)
        text, placed = place_media(prompt, opened) if isinstance(prompt, str) else (prompt, opened)
        return self.answer(Prompt(text, placed, draw), settings, **options)

    def stream(self, *args: Any, **options: Any) -> Generator[Part, None, Reply]:
        """Yield the pieces of the answer while it is generated: text, and each image once it is drawn.

        The arguments are those of `reply`. Closing the generator ends the answer. It returns the reply.
        """
        cancelled = threading.Event()
        return stream_parts(
            lambda on_part: self.reply(*args, on_part=on_part, cancelled=cancelled, **options), cancelled
        )

    def chat(self, system: str | None = None) -> Chat:
        """Start a conversation of several turns; see [`Chat`]."""
        return Chat(self, system)

    def answer(
        self,
        prompt: Prompt,
        settings: SamplerSettings | None = None,
        *,
        on_part: OnPart | None = None,
        cancelled: threading.Event | None = None,
        **options: Any,
    ) -> Reply:
        """See `reply`. `on_part` gets each piece of the answer, images drawn; setting `cancelled` ends the answer."""
        fields = {field.name for field in dataclasses.fields(Prompt)}
        prompt = replace(prompt, **{name: options.pop(name) for name in fields & options.keys()})
        settings = settings or SamplerSettings()
        number = itertools.count()

        def take(_: int, part: Part) -> Part:
            if isinstance(part, ImagePart) and self.pipeline is not None:
                (images,) = draw_each(self.pipeline, part.visual_tokens, settings.of_image(next(number)))
                part = replace(part, images=images)
            if on_part is not None:
                on_part(part)
            return part

        events = None if cancelled is None else [cancelled]
        (reply,) = reply_to(self.model, self.processor, [prompt], on_part=take, cancelled=events, **options)
        if reply.num_images and self.pipeline is None:
            logger.warning("the reply holds %d image(s), not drawn: load a visualizer, too", reply.num_images)
        return reply

    def answer_all(
        self,
        prompts: Sequence[Prompt],
        settings: SamplerSettings | None = None,
        *,
        seeds: Sequence[int] | None = None,
        **options: Any,
    ) -> list[Reply]:
        """Answer prompts in batches and draw all their images together; an answer does not depend on the others.

        The first image of each answer has its seed of `seeds` (by default `settings.seed`), the second the next one.
        `options` are those of [`reply_to`].
        """
        settings = settings or SamplerSettings()
        replies = reply_to(self.model, self.processor, prompts, **options)
        if self.pipeline is None or not replies:
            return replies
        firsts = [settings.seed] * len(replies) if seeds is None else seeds
        each = [seed + index for seed, reply in zip(firsts, replies, strict=True) for index in range(reply.num_images)]
        drawn = iter(draw_each(self.pipeline, torch.cat([reply.visual_tokens for reply in replies]), settings, each))

        def with_images(part: Part) -> Part:
            return replace(part, images=next(drawn)) if isinstance(part, ImagePart) else part

        return [replace(reply, parts=tuple(map(with_images, reply.parts))) for reply in replies]


def load(
    model: str | Path,
    visualizer: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    *,
    device_map: str | dict[str, Any] | None = None,
    quantization_config: BitsAndBytesConfig | None = None,
    torch_compile: bool = False,
) -> Session:
    """Load a trained model and, to draw its images, a visualizer.

    Args:
        model: Folder or Hub id of a MetaMorph model or adapter; `mini` is the one that ships with the package.
        visualizer: Folder or Hub id of its visualizer, or `mini`. Without one, images stay visual tokens.
        device: By default the accelerator if there is one.
        dtype: Precision of the weights of both; by default as saved.
        device_map: Instead of `device`, places the parts of the model as in Transformers: `auto` on all devices.
        quantization_config: Such as `BitsAndBytesConfig(load_in_4bit=True)`. By default only the decoder's layers are
            quantised, as in training; the visualizer never is.
        torch_compile: Compile a step of generation, with a cache of a fixed size. The first answers take longer.
    """
    return open_session(
        model,
        visualizer,
        device,
        dtype,
        device_map=device_map,
        quantization_config=quantization_config,
        torch_compile=torch_compile,
    )


def open_session(
    model: str | Path,
    visualizer: str | Path | None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    *,
    device_map: str | dict[str, Any] | None = None,
    quantization_config: BitsAndBytesConfig | None = None,
    torch_compile: bool = False,
    flag_prefix: str = "",
) -> Session:
    """See [`load`]. Errors name arguments after `flag_prefix`, which is `--` in commands."""
    where = pick_device(device, flag=f"{flag_prefix}device")
    model = shipped_folder(str(model), "model")
    check_metamorph_model(model, flag=f"{flag_prefix}model")
    if visualizer is not None:  # before the weights of the model, which take longer
        visualizer = shipped_folder(str(visualizer), "visualizer")
        check_visualizer_folder(visualizer, f"{flag_prefix}visualizer")
    options: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    if device_map is not None:
        for name, clashes in (("device", device is not None), ("torch_compile", torch_compile)):
            if clashes:
                raise ValueError(
                    f"{_name('device_map', flag_prefix)} and {_name(name, flag_prefix)} exclude each other"
                )
        options["device_map"] = device_map
    is_quantised = quantization_config is not None
    if is_adapter_folder(model) and read_adapter_base(model).quantization is not None:
        is_quantised = True
    if torch_compile and is_quantised:  # Transformers would leave it out
        raise ValueError(f"{_name('torch_compile', flag_prefix)} does not work with 4-bit and 8-bit weights")
    if quantization_config is not None:
        require_bitsandbytes()
        quantization_config = copy.deepcopy(quantization_config)
        if quantization_config.llm_int8_skip_modules is None:
            quantization_config.llm_int8_skip_modules = list(PARTS_NOT_QUANTISED)
        options = {"device_map": {"": where}, **options, "quantization_config": quantization_config}
    with errors_name_flag(f"{flag_prefix}model", model):
        processor = MetaMorphProcessor.from_pretrained(model)
        network = MetaMorphForConditionalGeneration.from_pretrained(model, **options)
        processor.check_fits(network.config)
    if "device_map" not in options:
        network.to(where)
    if torch_compile:
        network.generation_config.compile_config = CompileConfig()
        network.generation_config.compile_config._compile_all_devices = True  # Transformers leaves CPUs out
    pipeline = None
    if visualizer is not None:
        pipeline = load_pipeline(visualizer, flag=f"{flag_prefix}visualizer", dtype=dtype).to(where)
        network.visualizer = partial(draw, pipeline)
    return Session(network.eval(), processor, pipeline)


def _name(argument: str, flag_prefix: str) -> str:
    """An argument as users wrote it: `device_map`, or `--device-map`."""
    return flag_prefix + (argument.replace("_", "-") if flag_prefix else argument)


def load_pipeline(
    visualizer: str, flag: str = "--visualizer", dtype: torch.dtype | None = None
) -> "VisualizationPipeline":
    """Load a visualizer without its progress bars, on the CPU, by default in float32; see `check_visualizer_folder`."""
    visualizer = check_visualizer_folder(visualizer, flag)
    from metamorph.visualization.pipeline import VisualizationPipeline

    with errors_name_flag(flag, visualizer):
        pipeline = VisualizationPipeline.from_pretrained(visualizer, torch_dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def check_visualizer_folder(visualizer: str, flag: str = "--visualizer") -> str:
    """Check a visualizer without loading its weights, and that diffusers is installed; returns its folder or Hub id."""
    check_reachable(visualizer, flag=flag, file="model_index.json")
    try:
        from metamorph.visualization.folders import check_visualizer, local_folder
    except ModuleNotFoundError as error:
        raise ValueError(f"{flag} {visualizer} needs {error.name}: {install_command('visualization')}") from error
    with errors_name_flag(flag, visualizer):
        check_visualizer(local_folder(visualizer))
    return visualizer


def pick_device(device: str | torch.device | None = None, flag: str = "device") -> torch.device:
    """The device of that name; by default the accelerator if there is one, else the CPU."""
    if device is None:
        return torch.accelerator.current_accelerator() or torch.device("cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # the latter: PyTorch was built without CUDA
        raise ValueError(f"{flag} {device} cannot be used here: {str(error).splitlines()[0]}") from error
