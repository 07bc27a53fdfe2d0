"""Checkpoint folders: written elsewhere and renamed when complete, with a manifest that reveals damaged files."""

from __future__ import annotations

import json
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


MANIFEST_FILE = "checkpoint.json"
"""Written last: a folder without it is incomplete."""
PARTIAL_FOLDER = "_partial"
"""Subfolder in which checkpoints are written. Uploads to the Hub skip names that begin with `_`."""
PREFIX = "checkpoint-"

Result = TypeVar("Result")

_WHOLE = 64 * 2**20
"""Size up to which the checksum covers all bytes of a file."""
_BLOCK = 4 * 2**20
"""Bytes of each end that it covers in larger files: a preempted run has no time to read a hundred gigabytes. A crash of
the machine or file server leaves files short or with zeros at the end."""


class CheckpointError(ValueError):
    """A checkpoint cannot be written or used; the message says what to do."""


def begin_checkpoint(output_dir: str | os.PathLike[str]) -> None:
    """Remove half-written checkpoints, and create the folder to write `checkpoint-STEP` in. For one process."""
    clean_up(output_dir)
    (Path(output_dir) / PARTIAL_FOLDER).mkdir(parents=True, exist_ok=True)


def clean_up(output_dir: str | os.PathLike[str]) -> None:
    """Remove half-written checkpoints, and restore one that was about to be replaced. For one process."""
    partial = Path(output_dir) / PARTIAL_FOLDER
    for replaced in partial.glob(f"replaced/{PREFIX}*"):
        if not (Path(output_dir) / replaced.name).exists():
            replaced.rename(Path(output_dir) / replaced.name)
    shutil.rmtree(partial, ignore_errors=True)


def commit_checkpoint(output_dir: str | os.PathLike[str], name: str, metadata: dict[str, Any]) -> Path:
    """Write the manifest of a checkpoint, the files and `metadata`, and move it into place; returns its new path.

    For one process, once all have written their files and `flush` has been called on each machine.
    """
    partial, final = Path(output_dir) / PARTIAL_FOLDER, Path(output_dir) / name
    source = partial / name
    serial = 1 + max((manifest["serial"] for manifest in _manifests(output_dir).values() if manifest), default=0)
    files = {
        path.relative_to(source).as_posix(): file_stamp(path) for path in sorted(source.rglob("*")) if path.is_file()
    }
    manifest = {"version": 1, "serial": serial, **metadata, "files": files}
    (source / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    sync(source / MANIFEST_FILE)
    for folder in (*(path for path in source.rglob("*") if path.is_dir()), source):
        sync(folder)
    if final.exists():  # of an earlier run that this one does not resume
        (partial / "replaced").mkdir(exist_ok=True)
        final.rename(partial / "replaced" / name)
    source.rename(final)
    sync(Path(output_dir))
    shutil.rmtree(partial, ignore_errors=True)
    return final


def flush(output_dir: str | os.PathLike[str]) -> None:
    """Write this machine's files of the new checkpoint through to the disk. For one process per machine."""
    for path in (Path(output_dir) / PARTIAL_FOLDER).rglob("*"):
        sync(path)


def checkpoints(output_dir: str | os.PathLike[str]) -> list[Path]:
    """The checkpoint folders in the order they were written; those without a readable manifest come last.

    After resuming from checkpoint-100, a new checkpoint-150 is newer than an old checkpoint-200.
    """
    manifests = _manifests(output_dir)

    def order(path: Path) -> tuple[float, int]:
        manifest = manifests[path]
        return math.inf if manifest is None else manifest["serial"], int(path.name.removeprefix(PREFIX))

    return sorted(manifests, key=order)


def find_damage(folder: str | os.PathLike[str]) -> str | None:
    """What is wrong with a checkpoint; None if it is undamaged."""
    folder = Path(folder)
    if not folder.is_dir():
        return "the folder does not exist"
    if not (folder / MANIFEST_FILE).is_file():
        return f"it has no {MANIFEST_FILE}, so it is incomplete"
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
    """The manifest of a checkpoint; None if it is missing or cannot be read."""
    try:
        manifest = json.loads((Path(folder) / MANIFEST_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    usable = isinstance(manifest, dict) and isinstance(manifest.get("files"), dict)
    return manifest if usable and isinstance(manifest.get("serial"), int) else None


def check_is_plain(folder: str | os.PathLike[str]) -> None:
    """Refuse a checkpoint whose weights are divided among processes where a model, adapter or connector is needed."""
    manifest = read_manifest(folder)
    if manifest is not None and manifest.get("in_shards"):
        raise ValueError(
            f"{folder} is a checkpoint of a sharded run and holds shards of the trained weights. For a plain folder, "
            f"add to the command of that run --resume_from_checkpoint {folder} --max_steps {manifest['step']} "
            "--load_best_model_at_end False --output_dir FOLDER; it trains no further"
        )


def delete_old(output_dir: str | os.PathLike[str], keep: int | None, protected: str | None = None) -> None:
    """Delete all but the newest complete checkpoints. For one process, after `commit_checkpoint`.

    At least one stays; a `keep` of None or 0 keeps all. `protected` (the best one so far) stays as one of the `keep`.
    """
    if not keep:
        return
    complete = [path for path in checkpoints(output_dir) if read_manifest(path) is not None]
    best = None if protected is None else Path(protected).resolve()
    spared = complete[-1:] + [path for path in complete[:-1] if path.resolve() == best]
    others = [path for path in complete if path not in spared]
    for path in others[: max(len(complete) - max(keep, len(spared)), 0)]:
        (path / MANIFEST_FILE).unlink()  # first: a half-deleted checkpoint counts as incomplete
        shutil.rmtree(path, ignore_errors=True)


def on_first_process(function: Callable[[], Result]) -> Result:
    """Call a function on the first process and return its result, or raise its error, on all. Every process calls this.

    An `OSError` or `ValueError` is raised as it is; for any other error, the others raise a `RuntimeError`.
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
    """Turn a failed write of `what` into a `CheckpointError` with the folder, free space and last good checkpoint.

    The half-written checkpoint is removed.
    """
    try:
        yield
    except Exception as error:
        if not _is_write_error(error):
            raise
        clean_up(output_dir)
        good = [path for path in reversed(checkpoints(output_dir)) if find_damage(path) is None]
        last = f"the last good checkpoint is {good[0]}" if good else "there is no checkpoint yet"
        free = shutil.disk_usage(output_dir).free / 2**30 if Path(output_dir).is_dir() else 0.0
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{what} cannot be written to --output_dir {output_dir} ({reason}; {free:.1f} GiB are free there): {last}. "
            "Free some space (there may be a quota) or lower --save_total_limit, then start the same command again"
        ) from error


def file_stamp(path: Path) -> dict[str, int]:
    """Size and CRC-32 of a file; the checksum of a large file covers only its ends."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= _WHOLE:
            return {"size": size, "crc32": zlib.crc32(file.read())}
        checksum = zlib.crc32(file.read(_BLOCK))
        file.seek(-_BLOCK, os.SEEK_END)
        return {"size": size, "crc32": zlib.crc32(file.read(_BLOCK), checksum)}


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
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


def _manifests(output_dir: str | os.PathLike[str]) -> dict[Path, dict[str, Any] | None]:
    """Every checkpoint folder with its manifest, None where it cannot be read."""
    folders = Path(output_dir).glob(f"{PREFIX}*")
    return {path: read_manifest(path) for path in folders if path.name.removeprefix(PREFIX).isdecimal()}
