"""Answers to fixed prompts during training: texts and images, in a folder per step and in the tracker."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from metamorph.data.media.stores import MediaError, load_image
from metamorph.files.permissions import save_file
from metamorph.inference.draw import draw
from metamorph.inference.reply import Prompt, Reply, can_draw, reply_to
from metamorph.inference.session import load_pipeline, pick_device, place_images
from metamorph.models.modeling_metamorph import MetaMorphForConditionalGeneration
from metamorph.models.processing_metamorph import MetaMorphProcessor, TextPart
from metamorph.models.sequence.constants import DEFAULT_IMAGE_TOKEN
from metamorph.training.arguments import MetaMorphTrainingArguments


if TYPE_CHECKING:
    from metamorph.training.trainer import MetaMorphTrainer
    from metamorph.visualization.pipeline import VisualizationPipeline


logger = logging.getLogger(__name__)

_TEXT_TOKENS = 128
"""New tokens of an answer, in addition to those of one image."""
_FIELDS = ("prompt", "images", "draw")


@dataclass(frozen=True)
class SamplePrompt:
    """A prompt of `--sample_prompts`."""

    text: str
    """The user's turn, with one `<image>` for each image."""
    images: tuple[Path, ...] = ()
    draw: bool = False
    """Whether to force the answer to start with an image."""


def read_prompts(path: str) -> list[SamplePrompt]:
    """Read `--sample_prompts`: JSON Lines of `{"prompt": …, "images": […], "draw": …}`, or text with a prompt per line.

    Image paths are relative to the folder of the file. Missing `<image>` markers are put before the text.

    Raises:
        FileNotFoundError: if the file or an image is missing.
        ValueError: if an entry is not valid, or an image cannot be read; the message names the line.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(
            f"--sample_prompts {path} does not exist: give a text file with one prompt per line, or JSON Lines"
        )
    prompts = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        where = f"--sample_prompts {path}, line {number}"
        prompts.append(_parse(line, where, file.parent) if file.suffix == ".jsonl" else SamplePrompt(line.strip()))
        _check(prompts[-1], where)
    if not prompts:
        raise ValueError(f"--sample_prompts {path} is empty: give one prompt per line")
    return prompts


def _parse(line: str, where: str, folder: Path) -> SamplePrompt:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
        raise ValueError(f'{where} must be {{"prompt": "…"}}, optionally with "images" and "draw", not {entry!r:.80}')
    unknown = [name for name in entry if name not in _FIELDS]
    images, draw = entry.get("images", []), entry.get("draw", False)
    if unknown or not isinstance(draw, bool) or not isinstance(images, list):
        raise ValueError(
            f"{where}: keys are prompt (text), images (a list of paths) and draw (true or false), not {entry!r:.80}"
        )
    if not all(isinstance(image, str) for image in images):
        raise ValueError(f"{where}: images must be paths, not {images!r:.80}")
    text = entry["prompt"]
    if DEFAULT_IMAGE_TOKEN not in text:
        text = place_images(text, len(images))
    return SamplePrompt(text, tuple(folder / image for image in images), draw)


def _check(prompt: SamplePrompt, where: str) -> None:
    markers = prompt.text.count(DEFAULT_IMAGE_TOKEN)
    if markers != len(prompt.images):
        raise ValueError(f"{where} has {markers} {DEFAULT_IMAGE_TOKEN}, but names {len(prompt.images)} images")
    for image in prompt.images:
        if not image.is_file():
            raise FileNotFoundError(f"{where}: there is no image {image}")
        _open(image)


def _open(path: Path) -> Image.Image:
    try:
        return load_image(path)
    except MediaError as error:
        raise ValueError(f"--sample_prompts: {error}") from error


@dataclass(frozen=True)
class Sample:
    """The answer to a prompt."""

    prompt: SamplePrompt
    text: str
    """With `[picture 1]` in the place of an image."""
    visual_tokens: Tensor
    """[images, N, D] float32 on the CPU."""


def answer(
    model: MetaMorphForConditionalGeneration, processor: MetaMorphProcessor, prompts: Sequence[SamplePrompt]
) -> list[Sample]:
    """Answer prompts greedily: the same weights give the same answers, and no random numbers are used.

    For a model that cannot draw, `draw` has no effect.
    """
    may_draw = can_draw(model)
    asked = [
        Prompt(prompt.text, tuple(_open(path) for path in prompt.images), prompt.draw and may_draw)
        for prompt in prompts
    ]
    # One at a time, because the model in training leaves little memory.
    replies = reply_to(
        model, processor, asked, batch_size=1, max_new_tokens=_TEXT_TOKENS + processor.num_image_tokens + 2
    )
    return [Sample(prompt, _text(reply), reply.visual_tokens) for prompt, reply in zip(prompts, replies, strict=True)]


def _text(reply: Reply) -> str:
    images = itertools.count(1)
    parts = [part.text if isinstance(part, TextPart) else f"[picture {next(images)}]" for part in reply.parts]
    return "".join(parts).strip()


def write_samples(
    samples: Sequence[Sample], folder: Path, pipeline: VisualizationPipeline | None = None
) -> dict[str, Image.Image]:
    """Write `samples.jsonl`, the visual tokens of all images (`pictures.safetensors`) and, with `pipeline`, PNG files.

    Returns:
        The drawn images by name (`001-1` is the first of the first answer).
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = [
        [f"{number:03d}-{image + 1}" for image in range(len(sample.visual_tokens))]
        for number, sample in enumerate(samples, 1)
    ]
    tokens = {
        name: sample.visual_tokens[position].contiguous()
        for sample, own in zip(samples, names, strict=True)
        for position, name in enumerate(own)
    }
    images: dict[str, Image.Image] = {}
    if tokens:
        save_file(tokens, folder / "pictures.safetensors")
        if pipeline is not None:
            images = dict(zip(tokens, _draw(pipeline, torch.stack(list(tokens.values()))), strict=True))
    for name, image in images.items():
        image.save(folder / f"{name}.png")
    with (folder / "samples.jsonl").open("w", encoding="utf-8") as file:
        for sample, own in zip(samples, names, strict=True):
            entry = {
                "prompt": sample.prompt.text,
                "images": [str(path) for path in sample.prompt.images],
                "draw": sample.prompt.draw,
                "answer": sample.text,
                "pictures": own,
            }
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
    return images


def _draw(pipeline: VisualizationPipeline, visual_tokens: Tensor) -> list[Image.Image]:
    """Draw on the accelerator, and free its memory for training."""
    pipeline.to(pick_device())
    try:
        return draw(pipeline, visual_tokens)
    finally:
        pipeline.to("cpu")


def open_samples(args: MetaMorphTrainingArguments) -> SampleWriter | None:
    """The callback that `--sample_steps` asks for, with prompts and visualizer; None without the flag.

    Raises:
        FileNotFoundError: if the file of the prompts, or an image of one, is missing.
        ValueError: if a prompt is not valid, or the visualizer cannot be opened.
    """
    if args.sample_steps is None:
        return None
    prompts = read_prompts(args.sample_prompts) if args.sample_prompts is not None else []
    pipeline = None
    if args.sample_visualizer is not None and args.process_index == 0:
        pipeline = load_pipeline(args.sample_visualizer, flag="--sample_visualizer")
    return SampleWriter(prompts, args.sample_steps, pipeline)


class SampleWriter(TrainerCallback):
    """Answers the prompts every `sample_steps` steps, into `output_dir`/samples/step-N and to the trackers.

    Sharded parameters need all ranks in every forward pass, so all ranks generate the same answers; otherwise the main
    process does, and the others wait.

    Args:
        prompts: The prompts.
        every: Interval in optimizer steps.
        pipeline: Draws visual tokens; without it only the tokens are written.
    """

    trainer: MetaMorphTrainer

    def __init__(
        self, prompts: Sequence[SamplePrompt], every: int, pipeline: VisualizationPipeline | None = None
    ) -> None:
        self.prompts = prompts
        self.every = every
        self.pipeline = pipeline

    def attach(self, trainer: MetaMorphTrainer) -> None:
        """Become a callback of the trainer, whose model and processor answer."""
        self.trainer = trainer
        trainer.add_callback(self)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Answer the prompts if it is time."""
        if state.global_step % self.every:
            return
        with self.trainer.monitor.pause():
            self.sample(state.global_step, Path(args.output_dir) / "samples" / f"step-{state.global_step}")
            # Inside the pause: otherwise the waiting of the others would count as training time.
            self.trainer.accelerator.wait_for_everyone()

    def sample(self, step: int, folder: Path) -> None:
        """Answer the prompts, write the answers to `folder` and log them to the trackers."""
        trainer = self.trainer
        if not (trainer.is_world_process_zero() or trainer.is_sharded):
            return
        with trainer.accelerator.autocast():
            samples = answer(trainer.plain_model, trainer.processing_class, self.prompts)
        if not trainer.is_world_process_zero():
            return
        images = write_samples(samples, folder, self.pipeline)
        num_images = sum(len(sample.visual_tokens) for sample in samples)
        form = "drawn" if self.pipeline else "as visual tokens"
        logger.info("step %d: %d answers with %d images, %s, in %s", step, len(samples), num_images, form, folder)
        texts = {f"samples/{number:03d}": f"{s.prompt.text}\n\n{s.text}" for number, s in enumerate(samples, 1)}
        for tracker in trainer.trackers:
            tracker.log_media(texts, {f"samples/{name}": image for name, image in images.items()}, step)
