"""Lines of a file of prompts: parsed and checked one by one, so that a bad one stops no other."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

from PIL import Image

from metamorph.data.media.refs import ImageRef
from metamorph.data.media.stores import FolderStore, load_all
from metamorph.flags.parser import nearest
from metamorph.inference.draw import SamplerSettings
from metamorph.inference.media import load_video
from metamorph.inference.prompt import Prompt, place_media
from metamorph.inference.sampling import MAX_SEED, Sampling
from metamorph.models.image_inputs import to_pil_image
from metamorph.models.sequence.constants import DEFAULT_IMAGE_TOKEN
from metamorph.models.sequence.conversations import Message, assign_images, parse_messages


FIELDS: dict[str, tuple[type | tuple[type, ...], str]] = {
    "id": ((str, int), "a string or a number"),
    "prompt": (str, "a string"),
    "messages": (list, "a list of messages"),
    "images": ((str, list), "a path or a list of paths"),
    "videos": ((str, list), "a path or a list of paths"),
    "draw": (bool, "true or false"),
    "seed": (int, "a number"),
    "max_new_tokens": (int, "a number"),
    "temperature": ((int, float), "a number"),
    "top_p": ((int, float), "a number"),
    "top_k": (int, "a number"),
    "stop": ((str, list), "a string or a list of strings"),
}
"""Fields of a line, their types, and those in words."""


@dataclass(frozen=True)
class BatchDefaults:
    """What holds for each line that does not say otherwise."""

    draw: bool = False
    sampling: Sampling = field(default_factory=lambda: Sampling(seed=0))
    settings: SamplerSettings = field(default_factory=SamplerSettings)
    max_new_tokens: int | None = None
    fps: float = 1.0
    """Frames per second of videos."""
    max_frames: int = 8
    """Most frames of a video."""
    dtype: str = "auto"
    """Precision of the model: a dtype, `4bit` or `8bit`."""


@dataclass(frozen=True)
class Request:
    """A parsed line."""

    prompt: Prompt
    seed: int
    """Of the noise of the answer's first image."""
    text: str
    """The user's words, for the metadata of images."""


def parse_line(line: Mapping[str, Any], folder: Path, defaults: BatchDefaults) -> Request:
    """What a line asks for, its images read from `folder`, which relative paths may not leave.

    A line that cannot be answered is a `ValueError` that says why.
    """
    _check_fields(line)
    seed = line.get("seed", defaults.settings.seed)
    given = {name: line[name] for name in ("temperature", "top_p", "top_k") if name in line}
    images = _strings(line, "images")
    videos = [
        load_video(FolderStore(folder).open(path), defaults.fps, defaults.max_frames)
        for path in _strings(line, "videos")
    ]
    prompt = Prompt(
        "",
        draw=line.get("draw", defaults.draw),
        sampling=replace(defaults.sampling, **given, seed=seed),
        max_new_tokens=line.get("max_new_tokens", defaults.max_new_tokens),
        stop=tuple(_strings(line, "stop")),
    )
    if "prompt" in line:
        if not line["prompt"].strip():
            raise ValueError('"prompt" is empty: say what the model should answer or draw')
        text, media = place_media(line["prompt"], [_open_image(image, folder) for image in images], videos)
        return Request(replace(prompt, text=text, images=media), seed, line["prompt"])
    if videos:
        raise ValueError('"videos" belong to a "prompt"; messages may have images only')
    if not all(isinstance(message, dict) for message in line["messages"]):
        raise ValueError('"messages" must be objects such as {"role": "user", "content": "…"}')
    messages = parse_messages(line["messages"])
    if not messages or messages[-1].role != "user":
        raise ValueError("the last message must be the user's")
    opened = tuple(_open_image(image, folder) for image in assign_images(messages, images))
    text = "".join(part if isinstance(part, str) else DEFAULT_IMAGE_TOKEN for part in messages[-1].parts)
    return Request(replace(prompt, text=[*map(_without_image, messages)], images=opened), seed, text)


def read_object(text: str) -> dict[str, Any]:
    """The JSON object of a line; a `ValueError` if it is none."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
        json.dumps(value, ensure_ascii=False).encode()  # half a character is no text
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the line is not JSON in UTF-8 ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f'the line is not an object such as {{"prompt": "draw a cat"}}: {text[:60]}')
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _check_fields(line: Mapping[str, Any]) -> None:
    for name, value in line.items():
        if name not in FIELDS:
            near = nearest(name, FIELDS)
            raise ValueError(f"unknown field {name!r}" + (f": did you mean {near!r}?" if near else ""))
        kind, words = FIELDS[name]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f'"{name}" must be {words}, not {json.dumps(value)[:60]}')
    if ("prompt" in line) == ("messages" in line):
        raise ValueError('the line needs either "prompt" or "messages"')
    for name, least in (("seed", 0), ("max_new_tokens", 1), ("top_k", 0)):
        if name in line and not least <= line[name] <= MAX_SEED:
            raise ValueError(f'"{name}" must be from {least} to {MAX_SEED}, not {line[name]}')


def _strings(line: Mapping[str, Any], name: str) -> Sequence[str]:
    """A field that is a string or a list of strings."""
    value = line.get(name, [])
    values = [value] if isinstance(value, str) else value
    if not all(isinstance(each, str) for each in values):
        raise ValueError(f'"{name}" must be {FIELDS[name][1]}, not {json.dumps(value)[:60]}')
    return values


def _open_image(reference: Any, folder: Path) -> Image.Image:
    if not isinstance(reference, str) or reference.startswith("data:"):
        return to_pil_image(reference)
    return load_all([ImageRef(reference)], FolderStore(folder))[0]


def _without_image(message: Message) -> dict[str, Any]:
    """A message as `apply_chat_template` takes it, its images passed separately."""
    parts = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in message.parts]
    return {"role": message.role, "content": parts}
