"""Answers to fixed prompts during training: texts and images, in a folder per step and in the tracker."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from metamorph.files.permissions import save_file
from metamorph.inference.draw import draw
from metamorph.inference.prompt import Prompt, place_media
from metamorph.inference.reply import Reply, can_draw, check_fits, prompt_length, reply_to
from metamorph.inference.session import load_pipeline, pick_device
from metamorph.models.image_files import MediaError, load_image
from metamorph.models.processing_metamorph import TextPart
from metamorph.training.arguments import MetaMorphTrainingArguments


if TYPE_CHECKING:
    from metamorph.training.trainer import MetaMorphTrainer
    from metamorph.visualization.pipeline import VisualizationPipeline


logger = logging.getLogger(__name__)

_TEXT_TOKENS = 128
"""New tokens of an answer, in addition to those of one image."""
_FIELDS = ("prompt", "images", "draw")


@dataclass(frozen=True)
class SamplePrompt(Prompt):
    """A prompt of `--sample_prompts`."""

    paths: tuple[str, ...] = ()
    """Paths of its images."""


def read_prompts(path: str) -> list[SamplePrompt]:
    """Read `--sample_prompts`: JSON Lines of `{"prompt": …, "images": […], "draw": …}`, or text with a prompt per line.

    Image paths are relative to the folder of the file. Missing `<image>` markers are put before the text.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(
            f"--sample_prompts {path} does not exist: give a text file with one prompt per line, or JSON Lines"
        )
    prompts = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            where = f"--sample_prompts {path}, line {number}"
            entry = _parse(line, where) if file.suffix == ".jsonl" else {"prompt": line.strip()}
            prompts.append(_open_prompt(entry, where, file.parent))
    if not prompts:
        raise ValueError(f"--sample_prompts {path} is empty: give one prompt per line")
    return prompts


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
        raise ValueError(f'{where} must be {{"prompt": "…"}}, optionally with "images" and "draw", not {entry!r:.80}')
    images = entry.get("images", [])
    unknown = [name for name in entry if name not in _FIELDS]
    if unknown or not isinstance(entry.get("draw", False), bool) or not isinstance(images, list):
        raise ValueError(
            f"{where}: keys are prompt (text), images (a list of paths) and draw (true or false), not {entry!r:.80}"
        )
    if not all(isinstance(image, str) for image in images):
        raise ValueError(f"{where}: images must be paths, not {images!r:.80}")
    return entry


def _open_prompt(entry: dict[str, Any], where: str, folder: Path) -> SamplePrompt:
    paths = [folder / name for name in entry.get("images", [])]
    try:
        text, _ = place_media(entry["prompt"], paths)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{where}: there is no image {path}")
    try:
        images = tuple(load_image(path) for path in paths)
    except MediaError as error:
        raise ValueError(f"--sample_prompts: {error}") from error
    return SamplePrompt(text, images, entry.get("draw", False), paths=tuple(map(str, paths)))


def write_samples(
    prompts: Sequence[SamplePrompt],
    replies: Sequence[Reply],
    folder: Path,
    pipeline: VisualizationPipeline | None = None,
) -> dict[str, Image.Image]:
    """Write `samples.jsonl`, the visual tokens of all images (`images.safetensors`) and, with `pipeline`, PNG files.

    Returns the drawn images by name (`001-1` is the first of the first answer).
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokens: dict[str, Tensor] = {}
    images: dict[str, Image.Image] = {}
    with (folder / "samples.jsonl").open("w", encoding="utf-8") as file:
        for number, (prompt, reply) in enumerate(zip(prompts, replies, strict=True), 1):
            own = {f"{number:03d}-{image}": token for image, token in enumerate(reply.visual_tokens, 1)}
            tokens |= own
            entry = {
                "prompt": prompt.text,
                "images": prompt.paths,
                "draw": prompt.draw,
                "answer": _text(reply),
                "answer_images": list(own),
            }
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
    if tokens:
        save_file({name: token.contiguous() for name, token in tokens.items()}, folder / "images.safetensors")
        if pipeline is not None:
            pipeline.to(pick_device())
            try:
                images = dict(zip(tokens, draw(pipeline, torch.stack(list(tokens.values()))), strict=True))
            finally:
                pipeline.to("cpu")  # its memory is needed for training
    for name, image in images.items():
        image.save(folder / f"{name}.png")
    return images


def _text(reply: Reply) -> str:
    """The words of an answer, with `[image 1]` in the place of an image."""
    images = itertools.count(1)
    parts = [part.text if isinstance(part, TextPart) else f"[image {next(images)}]" for part in reply.parts]
    return "".join(parts).strip()


def open_samples(args: MetaMorphTrainingArguments) -> SampleWriter | None:
    """The callback that `--sample_steps` asks for, with prompts and visualizer; None without the flag."""
    if args.sample_steps is None or args.sample_prompts is None:  # they are given together
        return None
    prompts, pipeline = read_prompts(args.sample_prompts), None
    if args.sample_visualizer is not None and args.process_index == 0:
        pipeline = load_pipeline(args.sample_visualizer, flag="--sample_visualizer")
    return SampleWriter(prompts, args.sample_steps, pipeline)


class SampleWriter(TrainerCallback):
    """Answers the prompts every `sample_steps` steps, into `output_dir`/samples/step-N and to the trackers.

    Answers are greedy: the same weights give the same answers, and no random numbers are used. Sharded parameters need
    all ranks in every forward pass, so all ranks generate the same answers; otherwise the main process does, and the
    others wait.
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
        model, processor = trainer.plain_model, trainer.processing_class
        for number, prompt in enumerate(self.prompts, start=1):
            length = prompt_length(processor, prompt)
            check_fits(model, processor, prompt, length, f"--sample_prompts: prompt {number}")
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
        model, processor = trainer.plain_model, trainer.processing_class
        asked = [replace(prompt, draw=prompt.draw and can_draw(model)) for prompt in self.prompts]
        limit = _TEXT_TOKENS + processor.num_image_tokens + 2
        with trainer.accelerator.autocast():
            # One at a time, because the model in training leaves little memory.
            replies = reply_to(model, processor, asked, batch_size=1, max_new_tokens=limit)
        if not trainer.is_world_process_zero():
            return
        images = write_samples(self.prompts, replies, folder, self.pipeline)
        num_images = sum(reply.num_images for reply in replies)
        form = "drawn" if self.pipeline else "as visual tokens"
        logger.info("step %d: %d answers with %d images, %s, in %s", step, len(replies), num_images, form, folder)
        texts = {
            f"samples/{number:03d}": f"{prompt.text}\n\n{_text(reply)}"
            for number, (prompt, reply) in enumerate(zip(self.prompts, replies, strict=True), 1)
        }
        for tracker in trainer.trackers:
            tracker.log_media(texts, {f"samples/{name}": image for name, image in images.items()}, step)
