"""Checkpoint folders: written beside their place and renamed, with a list of their files by which damage is found."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from safetensors import SafetensorError


logger = logging.getLogger(__name__)

MANIFEST_FILE = "checkpoint.json"
"""Written last: a folder without it is incomplete."""
PARTIAL_FOLDER = "_partial"
"""Where checkpoints are written, in the output folder. Uploads to the Hub leave out what begins with `_`."""
PREFIX = "checkpoint-"

Result = TypeVar("Result")

_WHOLE = 64 * 2**20
"""Files up to this size are checked whole."""
_BLOCK = 4 * 2**20
"""Of larger ones, the first and last so many bytes: reading a hundred gigabytes would cost a preempted run its time.
A crash of the machine or of a file server leaves files short or with zeros at their end."""


class CheckpointError(ValueError):
    """A checkpoint cannot be written or used; the message tells which is still good and what to do."""


def begin_checkpoint(output_dir: str | os.PathLike[str]) -> Path:
    """Remove what an earlier run has left half-written, and make room for a new checkpoint. For one process.

    Args:
        output_dir: Folder of the run.

    Returns:
        The folder in which `checkpoint-STEP` is to be written.
    """
    folder = Path(output_dir)
    clean_up(folder)
    partial = folder / PARTIAL_FOLDER
    partial.mkdir(parents=True, exist_ok=True)
    return partial


def clean_up(output_dir: str | os.PathLike[str]) -> None:
    """Remove half-written checkpoints, and put back one that was about to be replaced. For one process."""
    partial = Path(output_dir) / PARTIAL_FOLDER
    for replaced in partial.glob(f"replaced/{PREFIX}*"):
        if not (Path(output_dir) / replaced.name).exists():
            replaced.rename(Path(output_dir) / replaced.name)
    shutil.rmtree(partial, ignore_errors=True)


def commit_checkpoint(output_dir: str | os.PathLike[str], name: str, record: dict[str, Any]) -> Path:
    """Give the checkpoint that `begin_checkpoint` made room for its list of files and its place.

    For one process, once all have written their files and `flush` has been called on each machine.

    Args:
        output_dir: Folder of the run.
        name: `checkpoint-STEP`.
        record: What the list of files tells beside them, as JSON.

    Returns:
        Path of the complete checkpoint.
    """
    partial, final = Path(output_dir) / PARTIAL_FOLDER, Path(output_dir) / name
    source = partial / name
    serial = 1 + max((manifest["serial"] for _, manifest in _readable(output_dir)), default=0)
    files = {
        path.relative_to(source).as_posix(): file_stamp(path) for path in sorted(source.rglob("*")) if path.is_file()
    }
    manifest = {"version": 1, "serial": serial, **record, "files": files}
    (source / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    sync(source / MANIFEST_FILE)
    sync(source)
    if final.exists():  # of an earlier run that this one does not go on from
        (partial / "replaced").mkdir(exist_ok=True)
        final.rename(partial / "replaced" / name)
    source.rename(final)
    sync(Path(output_dir))
    shutil.rmtree(partial, ignore_errors=True)
    return final


def flush(output_dir: str | os.PathLike[str]) -> None:
    """Wait until what this machine has written of the new checkpoint is on the disk. For one process per machine."""
    for path in (Path(output_dir) / PARTIAL_FOLDER).rglob("*"):
        sync(path)


def checkpoints(output_dir: str | os.PathLike[str]) -> list[Path]:
    """The checkpoint folders, oldest first; those whose list of files cannot be read come behind all others.

    "Old" is what was written earlier: after going back to checkpoint-100, the new checkpoint-150 is newer than an old
    checkpoint-200.
    """
    serials = {path: manifest["serial"] for path, manifest in _readable(output_dir)}
    return sorted(_folders(output_dir), key=lambda path: (serials.get(path, math.inf), _step(path)))


def damage(folder: str | os.PathLike[str]) -> str | None:
    """What is wrong with a checkpoint; None if it is as it was written."""
    folder = Path(folder)
    if not folder.is_dir():
        return "there is no such folder"
    if not (folder / MANIFEST_FILE).is_file():
        return f"it has no {MANIFEST_FILE}, so it was not written to its end"
    manifest = read_manifest(folder)
    if manifest is None:
        return f"its {MANIFEST_FILE} cannot be read"
    for name, stamp in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            return f"its {name} is missing"
        if path.stat().st_size != stamp["size"]:
            return f"its {name} has {path.stat().st_size} bytes instead of {stamp['size']}"
        if file_stamp(path) != stamp:
            return f"the content of its {name} has changed since it was written"
    return None


def read_manifest(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """What `commit_checkpoint` has written; None if there is nothing or it cannot be read."""
    try:
        manifest = json.loads((Path(folder) / MANIFEST_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    usable = isinstance(manifest, dict) and isinstance(manifest.get("files"), dict)
    return manifest if usable and isinstance(manifest.get("serial"), int) else None


def delete_old(output_dir: str | os.PathLike[str], keep: int | None, protected: str | None = None) -> None:
    """Delete all but the newest complete checkpoints. For one process, after `commit_checkpoint`.

    Args:
        output_dir: Folder of the run.
        keep: How many stay, at least one; None or 0 keeps all.
        protected: Path of a checkpoint that stays in any case (the best one so far), as one of the `keep`.
    """
    if not keep:
        return
    complete = [path for path in checkpoints(output_dir) if read_manifest(path) is not None]
    best = None if protected is None else Path(protected).resolve()
    spared = complete[-1:] + [path for path in complete[:-1] if path.resolve() == best]
    others = [path for path in complete if path not in spared]
    for path in others[: max(len(complete) - max(keep, len(spared)), 0)]:
        (path / MANIFEST_FILE).unlink()  # first: what is half deleted counts as incomplete
        shutil.rmtree(path, ignore_errors=True)


def on_first_process(function: Callable[[], Result]) -> Result:
    """Call a function on the first process, and give its result, or its error, to all. Every process must call it.

    Args:
        function: What looks at, or changes, the folder of the run. An `OSError` or `ValueError` is raised on all
            processes; for any other error, the others raise a `RuntimeError` that quotes it.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return function()
    answer: list[Any] = [None, RuntimeError("the first process has stopped")]
    if dist.get_rank() == 0:
        try:
            answer = [function(), None]
        except Exception as error:
            is_plain = isinstance(error, (OSError, ValueError))
            answer[1] = error if is_plain else RuntimeError(f"the first process has failed: {error!r}")
            raise
        finally:  # the others wait for it
            dist.broadcast_object_list(answer)
        return answer[0]
    dist.broadcast_object_list(answer)
    result, problem = answer
    if problem is not None:
        raise problem
    return result


@contextmanager
def explains_write_errors(output_dir: str | os.PathLike[str], what: str) -> Iterator[None]:
    """Turn a failed write into an error that names the folder, the free space and the last good checkpoint.

    Args:
        output_dir: Folder of the run.
        what: What is being written.

    Raises:
        CheckpointError: Instead of the errors of the libraries that write. The half-written checkpoint is removed.
    """
    try:
        yield
    except Exception as error:
        if not _is_write_error(error):
            raise
        clean_up(output_dir)
        good = [path for path in reversed(checkpoints(output_dir)) if damage(path) is None]
        last = f"the last good checkpoint is {good[0]}" if good else "there is no checkpoint yet"
        free = shutil.disk_usage(output_dir).free / 2**30 if Path(output_dir).is_dir() else 0.0
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{what} cannot be written to --output_dir {output_dir} ({reason}; {free:.1f} GiB are free there): {last}. "
            "Make room (quotas count, too) or lower --save_total_limit, then start the same command again"
        ) from error


def file_stamp(path: Path) -> dict[str, int]:
    """Size and CRC-32 of a file, of a large one's ends only."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= _WHOLE:
            return {"size": size, "crc32": zlib.crc32(file.read())}
        checksum = zlib.crc32(file.read(_BLOCK))
        file.seek(-_BLOCK, os.SEEK_END)
        return {"size": size, "crc32": zlib.crc32(file.read(_BLOCK), checksum)}


def sync(path: Path) -> None:
    """Write a file or folder through to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_write_error(error: Exception) -> bool:
    if isinstance(error, (OSError, SafetensorError)):
        return True
    # The writers of PyTorch and of the tokenizers have no error class of their own.
    return "inline_container.cc" in str(error) or (type(error) is Exception and "(os error " in str(error))


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix(PREFIX))


def _folders(output_dir: str | os.PathLike[str]) -> list[Path]:
    return [path for path in Path(output_dir).glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdecimal()]


def _readable(output_dir: str | os.PathLike[str]) -> list[tuple[Path, dict[str, Any]]]:
    manifests = ((path, read_manifest(path)) for path in _folders(output_dir))
    return [(path, manifest) for path, manifest in manifests if manifest is not None]
