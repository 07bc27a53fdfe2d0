"""Where the records of large files begin: found once, saved, and memory-mapped by all processes."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import stat
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from metamorph.data.records import DataError
from metamorph.runs.checkpoint_files import file_stamp, sync


logger = logging.getLogger(__name__)

CACHE_VARIABLE = "METAMORPH_CACHE"
MIN_CACHED_BYTES = 16 * 2**20
"""Smaller sources are indexed at every start: that takes less than a tenth of a second."""
_VERSION = 2
"""Raise it when the arrays of an index change their meaning, or the way they are saved."""
_ABOUT = "index.json"
"""Lists the indexed files, and the sizes and digests of the saved arrays."""
_MAX_OPEN_FILES = 64


def cache_folder() -> Path:
    """Where indexes are saved: `$METAMORPH_CACHE`, else `metamorph` in the user's cache folder.

    The folder may be deleted at any time; its content is made again when needed.
    """
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "metamorph"


@dataclass(frozen=True)
class FileStamp:
    """A file, with its size in bytes and the time of its last change."""

    path: str
    """Absolute path."""
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: str | os.PathLike[str]) -> FileStamp:
        """The stamp of a file as it is now.

        Raises:
            FileNotFoundError: If there is no such file.
            DataError: If it is not a regular file. A pipe could be read only once, and opening it may block forever.
        """
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"{path} is not a regular file, so it does not allow random access; copy it to a file")
        return cls(os.path.abspath(path), status.st_size, status.st_mtime_ns)


class Index:
    """Arrays about files, memory-mapped if they were saved (then `arrays` is their folder), and the files themselves.

    Copies in other processes, forked or spawned, map the same memory.
    """

    def __init__(self, stamps: Sequence[FileStamp], arrays: Mapping[str, np.ndarray] | Path) -> None:
        self.stamps = tuple(stamps)
        self._open: OrderedDict[int, int] = OrderedDict()
        self._folder = arrays if isinstance(arrays, Path) else None
        if isinstance(arrays, Path):
            arrays = {path.stem: np.load(path, mmap_mode="r", allow_pickle=False) for path in arrays.glob("*.npy")}
        self._arrays = dict(arrays)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._arrays[name]

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def fingerprint(self) -> str:
        """Changes when one of the files does."""
        return _digest(*(f"{stamp.path}\0{stamp.size}\0{stamp.mtime_ns}" for stamp in self.stamps))

    def read(self, start: int, end: int, file: int = 0) -> bytes:
        """Read the bytes `[start, end)` of a file. Forked copies share no file position.

        Raises:
            DataError: If the file has changed since it was indexed, or has no such bytes.
        """
        if not 0 <= start <= end <= self.stamps[file].size:
            raise DataError(
                f"{self.stamps[file].path} has no bytes {start} to {end}: its index is damaged; delete {cache_folder()}"
            )
        return os.pread(self._descriptor(file), end - start, start)

    def _descriptor(self, file: int) -> int:
        """An open file; only those used last stay open."""
        if file in self._open:
            self._open.move_to_end(file)
            return self._open[file]
        stamp = self.stamps[file]
        descriptor = os.open(stamp.path, os.O_RDONLY)
        status = os.fstat(descriptor)
        if (status.st_size, status.st_mtime_ns) != (stamp.size, stamp.mtime_ns):
            os.close(descriptor)
            raise DataError(f"{stamp.path} has changed since it was indexed; restart to index it again")
        self._open[file] = descriptor
        if len(self._open) > _MAX_OPEN_FILES:
            os.close(self._open.popitem(last=False)[1])
        return descriptor

    def __getstate__(self) -> dict[str, Any]:
        """Without open files, and without arrays that can be mapped again."""
        return {"stamps": self.stamps, "arrays": self._folder or self._arrays}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __del__(self) -> None:
        for descriptor in getattr(self, "_open", {}).values():  # absent if the constructor failed
            os.close(descriptor)


def index_files(files: Sequence[Path], kind: str, build: Callable[[], dict[str, np.ndarray]]) -> Index:
    """Open the saved index of files, or make it with `build` and save it; indexes of different kinds are apart.

    Several processes may ask at once, as the ranks of a run do: the first makes the index, the others wait. If the
    files have changed since it was saved (in size or time of change), or the saved index is damaged, it is made again.
    If the cache folder is not writable, each process makes its own index. No array may be empty.

    Raises:
        DataError: If a file is not a regular file, or changes meanwhile.
        FileNotFoundError: If a file does not exist.
    """
    stamps = [FileStamp.of(file) for file in files]
    if sum(stamp.size for stamp in stamps) < MIN_CACHED_BYTES:
        return Index(stamps, build())
    of_files = f"{kind}-{_digest(str(_VERSION), *(stamp.path for stamp in stamps))}"
    of_state = _digest(*(f"{stamp.size}\0{stamp.mtime_ns}" for stamp in stamps))
    folder = cache_folder() / "index" / f"{of_files}-{of_state}"
    if _is_complete(folder):
        return Index(stamps, folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.parent / f"{of_files}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.info("Waiting for another process to index %s", files[0])
            lock.acquire()
    except (OSError, NotImplementedError) as error:  # the latter: a file system without locks
        _warn_unsaved(files[0], folder.parent, error)
        return Index(stamps, build())
    try:
        if _is_complete(folder):  # another process has made it meanwhile
            return Index(stamps, folder)
        if folder.is_dir():
            logger.warning("The index of %s in %s is damaged: it is made again", files[0], folder)
            shutil.rmtree(folder, ignore_errors=True)
        arrays = build()
        for stamp in stamps:
            if FileStamp.of(stamp.path) != stamp:
                raise DataError(
                    f"{stamp.path} changed while it was indexed; wait until it is complete, then start again"
                )
        if not _save(folder, folder.parent / f".new-{of_files}", stamps, arrays):
            return Index(stamps, arrays)
        for old in folder.parent.glob(f"{of_files}-*"):
            if old != folder:  # of an earlier state; a process that has mapped it keeps its memory
                logger.info("%s has changed: it was indexed again", files[0])
                shutil.rmtree(old, ignore_errors=True)
        return Index(stamps, folder)
    finally:
        lock.release()


def _save(folder: Path, temporary: Path, stamps: Sequence[FileStamp], arrays: Mapping[str, np.ndarray]) -> bool:
    """Save the arrays, so that the folder appears complete or not at all; False if that failed (a full disk, say)."""
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed; the lock keeps others out
    try:
        temporary.mkdir()
        for name, values in arrays.items():
            np.save(temporary / f"{name}.npy", values, allow_pickle=False)
        written = {f"{name}.npy": file_stamp(temporary / f"{name}.npy") for name in arrays}
        about = {"files": [asdict(stamp) for stamp in stamps], "arrays": written}
        (temporary / _ABOUT).write_text(json.dumps(about) + "\n", encoding="utf-8")
        for path in (*temporary.iterdir(), temporary):  # or a crash could leave the folder without its content
            sync(path)
        temporary.rename(folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        _warn_unsaved(Path(stamps[0].path), folder.parent, error)
        return False
    return True


def _is_complete(folder: Path) -> bool:
    """Whether the folder has an index whose arrays are as they were written."""
    try:
        written = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))["arrays"]
        return all(file_stamp(folder / name) == stamp for name, stamp in written.items())
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return False


def _warn_unsaved(file: Path, folder: Path, error: Exception) -> None:
    text = "The index of %s was not saved in %s (%s), so every process makes its own; set %s to a writable folder"
    logger.warning(text, file, folder, error, CACHE_VARIABLE)


def _digest(*parts: str) -> str:
    return hashlib.blake2b("\n".join(parts).encode(errors="surrogateescape"), digest_size=8).hexdigest()
