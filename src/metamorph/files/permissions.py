"""Safetensors files with the permissions of the umask; safetensors itself makes them readable by their owner only."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from torch import Tensor


logger = logging.getLogger(__name__)


def save_file(tensors: Mapping[str, Tensor], file: str | Path, metadata: dict[str, str] | None = None) -> None:
    """`safetensors.torch.save_file`, with the permissions of other new files."""
    safetensors.torch.save_file(dict(tensors), file, metadata)  # noqa: TID251 - the one place
    apply_umask(Path(file))


def apply_umask(*files: Path) -> None:
    """Give safetensors files that a library has just written the permissions of other new files."""
    # Reading the umask sets it. What another thread creates meanwhile is too private rather than too open.
    umask = os.umask(0o077)
    os.umask(umask)
    for file in files:
        try:
            file.chmod(0o666 & ~umask)
        except OSError as error:  # some network file systems have no permissions
            logger.warning("only its owner can read %s: %s", file, error)
