"""Permissions of the files we write: what the umask gives, where safetensors gives none to group and others."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from torch import Tensor


logger = logging.getLogger(__name__)


def save_file(tensors: Mapping[str, Tensor], file: str | Path, metadata: dict[str, str] | None = None) -> None:
    """`safetensors.torch.save_file`, with the permissions of other new files.

    Args:
        tensors: Contiguous tensors that share no memory.
        file: Where to write.
        metadata: Texts of the header.
    """
    safetensors.torch.save_file(dict(tensors), file, metadata)  # noqa: TID251 - the one place
    apply_umask(Path(file))


def apply_umask(*files: Path) -> None:
    """Give safetensors files that a library has just written the permissions of other new files.

    safetensors writes to a temporary file, which only its owner may read, and renames it.

    Args:
        *files: What was written.
    """
    mode = 0o666 & ~_umask()
    for file in files:
        try:
            file.chmod(mode)
        except OSError as error:  # some network file systems have no permissions
            logger.warning("%s stays readable by its owner only: %s", file, error)


def _umask() -> int:
    # It cannot be read without being set. What another thread creates in between is too private, never too open.
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
