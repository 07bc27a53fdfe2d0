"""Files of answers: images that say how they were drawn, contact sheets, and visual tokens that nothing has drawn."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors import SafetensorError, safe_open

from metamorph import __version__
from metamorph.files.permissions import save_file
from metamorph.inference.draw import SamplerSettings
from metamorph.inference.reply import Reply
from metamorph.inference.sampling import Sampling
from metamorph.models.processing_metamorph import ImagePart, TextPart
from metamorph.visualization.grids import image_grid


TOKENS_SUFFIX = ".safetensors"
TOKENS = "visual_tokens"
"""Name of the tensor `[images, N, D]` in a file of visual tokens."""
SMALL_SIDE = 256
"""Images narrower than this are enlarged to look at them."""
_SHEET_SIDES = (128, 384)
"""Smallest and largest width of an image on a contact sheet."""


@dataclass
class AnswerFiles:
    """Writes the images of one answer to `output`, and further ones to the same name with `-2`, `-3`, …

    Images are saved with `metadata` as text chunks if they are PNGs. Images that were not drawn are saved as visual
    tokens. Existing files are left alone, their names skipped, unless `overwrite`.
    """

    output: Path
    metadata: Mapping[str, Any]
    """How the answer came about: prompt, model, …"""
    settings: SamplerSettings = field(default_factory=SamplerSettings)
    """With which the visualizer drew."""
    overwrite: bool = False
    parts: list[ImagePart] = field(default_factory=list)
    """The images so far."""
    files: list[list[Path]] = field(default_factory=list)
    """The files of each image: its drawings, or its visual tokens."""

    def add(self, part: ImagePart) -> list[Path]:
        """Save an image of the answer; returns its files."""
        self.output.parent.mkdir(parents=True, exist_ok=True)
        taken = {file for files in self.files for file in files}
        found: list[Path] = []
        if part.images:
            drawings = self.settings.of_image(len(self.parts)).drawings
            for image, (seed, scale) in zip(part.images, drawings, strict=True):
                found.append(self._next_free(self.output, taken.union(found)))
                own = {"seed": seed, "guidance_scale": f"{scale:g}"}
                save_image(image, found[-1], {**self.metadata, **own})
        else:
            found.append(self._next_free(self.output.with_suffix(TOKENS_SUFFIX), taken))
            save_tokens(part.visual_tokens, found[0], self.metadata)
        self.parts.append(part)
        self.files.append(found)
        return found

    def save_sheet(self) -> Path | None:
        """Save all drawings of the answer on one contact sheet, `…-sheet`; None if there are fewer than two."""
        drawn = [part for part in self.parts if part.images]
        if sum(len(part.images) for part in drawn) < 2:
            return None
        first = next(file for files in self.files for file in files if file.suffix != TOKENS_SUFFIX)
        sheet = first.with_stem(f"{first.stem}-sheet")
        contact_sheet(drawn, self.settings).save(sheet)
        return sheet

    def _next_free(self, output: Path, taken: set[Path]) -> Path:
        def is_free(file: Path) -> bool:
            others = (file.with_stem(f"{file.stem}-{kind}") for kind in ("preview", "sheet"))
            return file not in taken and (self.overwrite or not any(each.exists() for each in (file, *others)))

        return next(filter(is_free, numbered(output)))


def numbered(file: Path) -> Iterator[Path]:
    """The name of a file, then the same with `-2`, `-3`, … before its suffix."""
    yield file
    yield from (file.with_stem(f"{file.stem}-{number}") for number in itertools.count(2))


def drawing_metadata(
    model: str, visualizer: str | None, prompt: str, sampling: Sampling | None, settings: SamplerSettings
) -> dict[str, Any]:
    """What an image depends on, besides its own seed and guidance scale and the images of the prompt."""
    sampled: dict[str, Any] = {}
    if sampling is not None and sampling.temperature:
        sampled = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
        sampled["sampling_seed"] = sampling.seed
    return {
        "prompt": prompt,
        "model": model,
        **({} if visualizer is None else {"visualizer": visualizer, "steps": settings.num_inference_steps}),
        **sampled,
    }


def save_image(image: Image.Image, file: Path, metadata: Mapping[str, Any]) -> None:
    """Save an image; a PNG gets each item of `metadata` as a text chunk, and the version of MetaMorph as `Software`."""
    chunks = PngInfo()
    for name, value in {**metadata, "Software": f"MetaMorph {__version__}"}.items():
        chunks.add_text(name, str(value).replace("\0", ""))
    image.save(file, pnginfo=chunks)  # other formats ignore it


def save_tokens(visual_tokens: torch.Tensor, file: Path, metadata: Mapping[str, Any]) -> None:
    """Save visual tokens `[N, D]` of one image, or `[images, N, D]`, as safetensors."""
    tokens = visual_tokens[None] if visual_tokens.dim() == 2 else visual_tokens
    texts = {name: str(value) for name, value in metadata.items()}
    save_file({TOKENS: tokens.contiguous()}, file, texts)


def load_tokens(file: str | Path) -> torch.Tensor:
    """Visual tokens `[images, N, D]` of a file that `save_tokens` wrote; a `ValueError` if it is another file."""
    try:
        with safe_open(file, framework="pt") as opened:
            if TOKENS not in opened.keys():  # noqa: SIM118 - it is no mapping
                raise ValueError(f"{file} holds no {TOKENS}: give a file of `metamorph generate` without --visualizer")
            tokens = opened.get_tensor(TOKENS)
    except SafetensorError as error:
        raise ValueError(f"{file} is not a safetensors file ({error})") from error
    if tokens.dim() != 3 or not tokens.is_floating_point() or not tokens.isfinite().all():
        raise ValueError(f"{file}: {TOKENS} must be finite numbers of shape [images, N, D], not {list(tokens.shape)}")
    return tokens


def contact_sheet(images: Sequence[ImagePart], settings: SamplerSettings) -> Image.Image:
    """All drawings of images in a grid: a row for each drawing, with a column for each guidance scale; with one scale,
    a row for each image, with a column for each drawing.
    """
    scales, width = settings.scales, images[0].images[0].width
    if len(scales) > 1:
        labels = [f"scale {scale:g}" for scale in scales]
    elif len(images) == 1:
        labels = [f"seed {seed}" for seed in settings.seeds]
    else:
        labels = [f"drawing {number + 1}" for number in range(settings.num_images)]
    drawn = [image for part in images for image in part.images]
    rows = [drawn[start : start + len(labels)] for start in range(0, len(drawn), len(labels))]
    return image_grid(rows, side=min(max(width, _SHEET_SIDES[0]), _SHEET_SIDES[1]), labels=labels, gap=2)


def enlarged(image: Image.Image, side: int = SMALL_SIDE) -> Image.Image:
    """A small image enlarged without smoothing, to look at it; another one as it is."""
    if image.width >= SMALL_SIDE:
        return image
    return image.resize((side, side * image.height // image.width), Image.Resampling.NEAREST)


def reply_json(reply: Reply, files: Sequence[Sequence[str]]) -> dict[str, Any]:
    """An answer for JSON; `files` are those of each of its images."""
    names = iter(files)
    parts = [
        {"type": "text", "text": part.text}
        if isinstance(part, TextPart)
        else {"type": "image", "files": [*next(names)]}
        for part in reply.parts
    ]
    return {
        "text": reply.text,
        "parts": parts,
        "finish_reason": reply.finish_reason,
        "num_prompt_tokens": reply.num_prompt_tokens,
        "num_tokens": reply.num_tokens,
    }


def save_conversation(messages: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Save a conversation as JSON, `{"messages": […]}`, and its images in a folder of the same name.

    The messages are those of `apply_chat_template`, with paths relative to the file.
    """
    folder = file.with_suffix("")
    numbers = itertools.count(1)

    def saved(part: TextPart | ImagePart) -> dict[str, str]:
        if isinstance(part, TextPart):
            return {"type": "text", "text": part.text}
        folder.mkdir(parents=True, exist_ok=True)
        number = next(numbers)
        names = [f"{number}.png", *(f"{number}-{other}.png" for other in range(2, len(part.images) + 1))]
        for image, name in zip(part.images, names, strict=False):
            image.save(folder / name)
        if part.images:
            return {"type": "image", "path": f"{folder.name}/{names[0]}"}
        save_tokens(part.visual_tokens, folder / f"{number}{TOKENS_SUFFIX}", {})
        return {"type": "image", TOKENS: f"{folder.name}/{number}{TOKENS_SUFFIX}"}

    file.parent.mkdir(parents=True, exist_ok=True)
    turns = [
        {**turn, "content": turn["content"] if isinstance(turn["content"], str) else [*map(saved, turn["content"])]}
        for turn in messages
    ]
    file.write_text(json.dumps({"messages": turns}, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
