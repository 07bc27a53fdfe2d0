"""Lengths of all samples, from tokenization alone: measured once, in parallel, and cached."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from metamorph.data.records import RecordError
from metamorph.runs.checkpoint_files import sync
from metamorph.runs.preemption import ignore_signals
from metamorph.runs.progress import Progress


if TYPE_CHECKING:
    from metamorph.data.dataset import MixtureDataset

logger = logging.getLogger(__name__)

_CHUNK = 512
"""Samples that a worker measures at a time."""
_WORTH_WORKERS = 8 * _CHUNK
"""Fewer samples are measured faster than workers start."""
_WORTH_KEEPING = 8 * _CHUNK
"""Fewer samples are measured at every start: it takes a second."""
_VERSION = 2
"""Raise it when lengths are measured differently, to invalidate older caches."""


@dataclass(frozen=True)
class Lengths:
    """int32 `[samples]` sizes before truncation. All are 0 for a sample that cannot be measured."""

    tokens: np.ndarray
    """Including those of images."""
    images: np.ndarray
    answer_images: np.ndarray
    text_targets: np.ndarray
    """Tokens with text loss."""

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def unknown(cls, num_samples: int) -> Lengths:
        """For plans that do not depend on lengths: one token each, no images."""
        nothing = np.zeros(num_samples, dtype=np.int32)
        return cls(np.ones(num_samples, dtype=np.int32), nothing, nothing, nothing)


def measure(dataset: MixtureDataset, num_workers: int = 0, cache_dir: str | os.PathLike[str] | None = None) -> Lengths:
    """Tokenize all samples and collect their sizes; no image is opened, and few samples need no workers.

    The result is saved in `cache_dir` for the next run, unless measuring takes only a second. It is measured again
    when a file, task, tokenizer, template or the number of image tokens has changed.
    """
    path = None
    if cache_dir is not None and len(dataset) >= _WORTH_KEEPING:
        path = Path(cache_dir) / f"lengths-{_fingerprint(dataset)}.npy"
    sizes = _load(path, len(dataset))
    if sizes is None:
        sizes = _measure(dataset, range(len(dataset)), num_workers)
        if path is not None:
            _save(path, sizes)
    elif path is not None and len(failed := np.flatnonzero(sizes[0] == 0)):
        # A video that was missing may be there now: a sample that counts as 0 tokens would overfill its row.
        again = _measure(dataset, failed.tolist(), num_workers)
        if again.any():
            sizes = np.array(sizes)
            sizes[:, failed] = again
            _save(path, sizes)
    return Lengths(*sizes)


class _Sizes(Dataset[torch.Tensor]):
    """int32 `[4]` sizes of each sample, for the workers of a data loader."""

    def __init__(self, dataset: MixtureDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> torch.Tensor:
        try:
            source, number = self.dataset.locate(index)
            sizes = source.measure(number)
        except RecordError:  # training reports it, or skips it
            sizes = (0, 0, 0, 0)
        return torch.tensor(sizes, dtype=torch.int32)


def _measure(dataset: MixtureDataset, indices: Sequence[int], num_workers: int) -> np.ndarray:
    """int32 `[4, len(indices)]`."""
    workers = num_workers if len(indices) >= _WORTH_WORKERS else 0
    loader = DataLoader(
        _Sizes(dataset), batch_size=_CHUNK, sampler=indices, num_workers=workers, worker_init_fn=ignore_signals
    )
    parts = []
    with Progress(desc="measuring lengths", total=len(indices), unit="sample", delay=2) as bar:
        for part in loader:
            parts.append(part.numpy())
            bar.update(len(part))
    return np.ascontiguousarray(np.concatenate(parts).T)


def _load(path: Path | None, num_samples: int) -> np.ndarray | None:
    """The saved sizes, memory-mapped so that the ranks of a machine share them; None if there are none."""
    if path is None or not path.is_file():
        return None
    try:
        sizes = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        logger.warning("%s cannot be read (%s): measuring lengths again", path, error)
        return None
    if sizes.shape != (4, num_samples) or sizes.dtype != np.int32:
        logger.warning("%s is not for %d samples: measuring lengths again", path, num_samples)
        return None
    return sizes


def _save(path: Path, sizes: np.ndarray) -> None:
    # Not named after the process id, which may repeat on machines that share a folder.
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            np.save(file, sizes, allow_pickle=False)
        sync(temporary)
        temporary.replace(path)  # atomic: another process never sees half a file
    except OSError as error:  # a read-only folder must not stop the run
        with suppress(OSError):
            temporary.unlink()
        logger.warning("lengths cannot be saved in %s (%s): the next run will measure them again", path.parent, error)


def _fingerprint(dataset: MixtureDataset) -> str:
    processor = dataset.processor
    tokenizer = processor.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)  # absent where a tokenizer is written in Python
    parts = [
        _VERSION,
        len(dataset),
        dataset.fingerprint(),
        sorted(tokenizer.get_vocab().items()) if backend is None else backend.to_str(),
        tokenizer.chat_template,
        processor.chat_template,
        processor.version,
        processor.num_image_tokens,
        processor.mm_use_im_start_end,
        processor.mm_use_im_patch_token,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]
