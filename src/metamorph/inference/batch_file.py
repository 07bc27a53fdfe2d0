"""Answers a file of prompts: results in the order of its lines, written as they are finished, resumed after a kill.

The results of `results.jsonl` are its lines, one for each line of the input; images and `batch.json`, the settings that
a resumed run must share, are in the folder `results`. Several processes, started by torchrun, answer consecutive lines
at the same time, and the first one writes.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from metamorph.flags.checks import printable
from metamorph.inference.answer_files import (
    TOKENS_SUFFIX,
    AnswerFiles,
    drawing_metadata,
    reply_json,
    save_tokens,
)
from metamorph.inference.batch_lines import BatchDefaults, Request, parse_line, read_object
from metamorph.inference.reply import Reply
from metamorph.inference.session import Session
from metamorph.mini import shipped_folder
from metamorph.models.processing_metamorph import ImagePart
from metamorph.runs.checkpoint_files import PREFIX, file_stamp, on_first_process
from metamorph.runs.lock import LOCK_FILE
from metamorph.runs.progress import Progress
from metamorph.runs.ranks import rank, world_size


logger = logging.getLogger(__name__)

SETTINGS_FILE = "batch.json"
_LOGGED = ("eval", "samples")
"""Folders of answers and images that training writes next to the model."""
_WAIT = datetime.timedelta(days=7)
"""Longest time that processes wait for each other. One that dies is noticed at once."""


def flag_of(name: str) -> str:
    """The flag of `metamorph generate` of that name."""
    return f"--{name.replace('_', '-')}"


@dataclass(frozen=True)
class Batch:
    """A file of prompts and where its results go."""

    source: Path
    """JSON lines; see `batch_lines.py`. Paths of images are relative to its folder."""
    results: Path
    """The file of results, which ends in `.jsonl`."""
    model: str
    """Folder or Hub id, or `mini`."""
    visualizer: str | None = None
    defaults: BatchDefaults = field(default_factory=BatchDefaults)
    keep_tokens: bool = False
    """Also save the visual tokens of each image that is drawn, as the .safetensors file of its first drawing's name."""
    media: str | None = None
    """Hash of the images and videos in the lines, which must then be the same when a run resumes."""
    name_of: Callable[[str], str] = flag_of
    """What errors call `input`, `output` and the other settings."""

    @property
    def folder(self) -> Path:
        """Images and settings."""
        return self.results.with_suffix("")

    def lines(self) -> list[tuple[int, str]]:
        """Numbers of lines, from 1 on, and their texts, without empty lines."""
        with self.source.open(encoding="utf-8-sig", errors="surrogateescape") as file:
            return [(number, line) for number, line in enumerate(file, start=1) if line.strip()]

    def settings(self) -> dict[str, Any]:
        """What decides the results: all of it must be the same when a run resumes."""
        return {
            "input": hashlib.sha256(self.source.read_bytes()).hexdigest(),
            "model": _stamp(shipped_folder(self.model, "model")),
            "visualizer": self.visualizer and _stamp(shipped_folder(self.visualizer, "visualizer")),
            **json.loads(json.dumps(_flags(self.defaults))),
            **({"keep_tokens": True} if self.keep_tokens else {}),
            **({} if self.media is None else {"media": self.media}),
        }


def _flags(defaults: BatchDefaults) -> dict[str, Any]:
    """The defaults by the names of their flags."""
    settings = defaults.settings
    sampling = {name: value for name, value in asdict(defaults.sampling).items() if name != "seed"}
    return {
        "draw": defaults.draw,
        **sampling,
        "seed": settings.seed,
        "guidance_scale": settings.guidance_scale,
        "steps": settings.num_inference_steps,
        "num_images": settings.num_images,
        "max_new_tokens": defaults.max_new_tokens,
        "fps": defaults.fps,
        "dtype": defaults.dtype,
        "max_frames": defaults.max_frames,
    }


def _stamp(model: str) -> Any:
    """Identifies a model: the content of its files, or its Hub id."""
    return {file.relative_to(model).as_posix(): file_stamp(file) for file in model_files(Path(model))} or model


def model_files(folder: Path) -> list[Path]:
    """The weights and settings of a model or a visualizer, without what its training has logged and saved; in order."""
    kinds = ("*.safetensors", "*.json", "*.jinja")
    found = (file for kind in kinds for file in folder.rglob(kind))
    places = ((file, file.relative_to(folder).parts[0]) for file in found)
    return sorted(file for file, top in places if not top.startswith((PREFIX, "_")) and top not in _LOGGED)


@contextmanager
def joined_processes() -> Iterator[None]:
    """Let the processes of a launcher talk to each other, each with its own accelerator; nothing for one process."""
    if world_size() == 1:
        yield
        return
    if torch.accelerator.is_available():
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]) % torch.accelerator.device_count())
    dist.init_process_group("gloo", timeout=_WAIT)
    try:
        yield
    finally:
        dist.destroy_process_group()


def open_results(batch: Batch, *, overwrite: bool = False) -> int:
    """Prepare the results for this run and return how many of them are there already. Every process calls this.

    An incomplete last line is removed. Results of another input, model or other settings are a `ValueError` that names
    what differs.
    """
    return on_first_process(lambda: _open_results(batch, overwrite))


def _open_results(batch: Batch, overwrite: bool) -> int:
    file, settings = batch.folder / SETTINGS_FILE, batch.settings()
    if batch.results.exists() and not overwrite:
        output = batch.name_of("output")
        advice = f"give another {output}, or --overwrite"
        if not file.is_file():
            raise ValueError(f"{output} {batch.results} exists, but {file} does not: {advice}")
        before = json.loads(file.read_text(encoding="utf-8"))
        if changed := [name for name in settings if before.get(name) != settings[name]]:
            difference = _difference(batch, before, settings, changed)
            raise ValueError(f"{output} {batch.results} holds results of {difference}: {advice}")
        return _count_results(batch)
    others = [] if file.is_file() or not batch.folder.is_dir() else [path.name for path in batch.folder.iterdir()]
    if others := sorted(set(others) - {LOCK_FILE}):
        raise ValueError(
            f"{batch.name_of('output')} {batch.results}: its images go to {batch.folder}, which holds other files such "
            f"as {others[0]}: give another {batch.name_of('output')}"
        )
    batch.folder.mkdir(parents=True, exist_ok=True)
    batch.results.unlink(missing_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    partial.replace(file)
    batch.results.touch()
    return 0


def _difference(batch: Batch, before: dict[str, Any], now: dict[str, Any], changed: Sequence[str]) -> str:
    def words(name: str) -> str:
        if name in ("input", "media", "model", "visualizer"):
            return f"another {batch.name_of(name)}"
        return f"{batch.name_of(name)} {before.get(name)}, which is now {now[name]}"

    # Other lines have other media.
    return " and ".join(words(name) for name in changed if name != "media" or "input" not in changed)


def _count_results(batch: Batch) -> int:
    """The number of complete results; removes a last line that a kill left incomplete."""
    content = batch.results.read_bytes()
    complete = content[: content.rfind(b"\n") + 1]
    if len(complete) < len(content):
        os.truncate(batch.results, len(complete))
    numbers = [number for number, _ in batch.lines()]
    written = complete.splitlines()
    for expected, line in zip(numbers, written, strict=False):
        try:
            found = read_object(line.decode("utf-8", errors="replace")).get("line")
        except ValueError:
            found = None
        if found != expected:
            raise ValueError(
                f"{batch.name_of('output')} {batch.results} is damaged: it lacks the result of line {expected} of "
                f"{batch.source}; give another {batch.name_of('output')}, or --overwrite"
            )
    return len(written)


def run_batch(session: Session, batch: Batch, done: int, batch_size: int) -> None:
    """Answer the lines after the first `done`, and append their results.

    Every process calls this, with the result of `open_results`. Answers do not depend on `batch_size` and the number of
    processes.
    """
    lines, start = batch.lines(), done
    with Progress(desc="answers", total=len(lines), initial=done, unit="prompt") as progress:
        while start < len(lines):
            # The last lines are divided evenly.
            size = min(batch_size, -(-(len(lines) - start) // world_size()))
            end = min(start + size * world_size(), len(lines))
            own = lines[min(start + size * rank(), end) : min(start + size * (rank() + 1), end)]
            try:
                results = _gathered(_answer(session, batch, own))
                if rank() == 0:
                    with batch.results.open("a", encoding="utf-8") as file:
                        file.writelines(json.dumps(result, ensure_ascii=False) + "\n" for result in results)
            except KeyboardInterrupt:
                raise KeyboardInterrupt(
                    f"after {start} of {len(lines)} lines: the same command answers the others"
                ) from None
            progress.update(end - start)
            start = end


def _gathered(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The results of all processes, in order."""
    if world_size() == 1:
        return results
    everywhere: list[Any] = [None] * world_size()
    dist.all_gather_object(everywhere, results)
    return [result for each in everywhere for result in each]


def _answer(session: Session, batch: Batch, lines: Sequence[tuple[int, str]]) -> list[dict[str, Any]]:
    """The results of lines, their images written."""
    found: list[dict[str, Any]] = []
    requests: list[Request | ValueError] = []
    for number, text in lines:
        found.append({"line": number})
        try:
            line = read_object(text)
            found[-1] |= {"id": line["id"]} if isinstance(line.get("id"), (str, int)) else {}
            requests.append(parse_line(line, batch.source.parent, batch.defaults))
        except ValueError as error:
            requests.append(error)
    good = [request for request in requests if isinstance(request, Request)]
    replies = iter(_reply(session, batch, good))
    for result, request in zip(found, requests, strict=True):
        reply = request if isinstance(request, ValueError) else next(replies)
        if isinstance(reply, ValueError):
            result["error"] = printable(str(reply))
        else:
            assert isinstance(request, Request)
            result |= reply_json(reply, _write_images(batch, result["line"], request, reply))
    return found


def _reply(session: Session, batch: Batch, requests: Sequence[Request]) -> list[Reply | ValueError]:
    """The replies, images drawn; one that fails is answered alone, so that it costs no other its answer."""
    if not requests:
        return []
    prompts, seeds = [request.prompt for request in requests], [request.seed for request in requests]
    try:
        return [*session.answer_all(prompts, batch.defaults.settings, seeds=seeds, batch_size=len(prompts))]
    except ValueError as error:
        return [error] if len(requests) == 1 else [each for one in requests for each in _reply(session, batch, [one])]


def _write_images(batch: Batch, number: int, request: Request, reply: Reply) -> list[list[str]]:
    """Write the images of an answer; returns their names, relative to the folder of the results."""
    settings = replace(batch.defaults.settings, seed=request.seed)
    metadata = drawing_metadata(batch.model, batch.visualizer, request.text, request.prompt.sampling, settings)
    files = AnswerFiles(batch.folder / f"{number:06}.png", metadata, settings, overwrite=True)
    for part in reply.parts:
        if isinstance(part, ImagePart):
            first = files.add(part)[0]
            if batch.keep_tokens:  # a part that is not drawn has this file already
                save_tokens(part.visual_tokens, first.with_suffix(TOKENS_SUFFIX), metadata)
    return [[file.relative_to(batch.results.parent).as_posix() for file in each] for each in files.files]


def count_errors(results: Path) -> int:
    """The number of results that are errors."""
    with results.open(encoding="utf-8") as file:
        return sum("error" in json.loads(line) for line in file)
