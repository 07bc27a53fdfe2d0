"""The flags that a checkpoint records, and how those of a run that resumes it may differ."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from metamorph.runs.checkpoint_files import CheckpointError, file_stamp


logger = logging.getLogger(__name__)

MODELS = ("model_name_or_path", "pretrained_model_name_or_path", "vision_tower")
"""Flags recorded by `describe_model`."""
_CHECKSUM = " crc32:"


def describe_model(name: str) -> str:
    """A folder or Hub id as recorded: the last part of its path and, for a folder, a checksum of its weights.

    A model may move, and many folders have the same name (`final`). Of large files the checksum covers both ends.
    """
    folder = Path(name).expanduser()
    checksum, found = 0, False
    for part in ("", "unet", "vae"):
        for file in sorted((folder / part).glob("*.safetensors")):
            found = True
            stamp = file_stamp(file)
            checksum = zlib.crc32(f"{part}/{file.name} {stamp['size']} {stamp['crc32']}".encode(), checksum)
    return f"{folder.name}{_CHECKSUM}{checksum:08x}" if found else folder.name


def compare_flags(
    checkpoint: str,
    old: dict[str, Any],
    new: dict[str, Any],
    fixed: Collection[str],
    confirmable: Collection[str] = (),
    confirmed: Collection[str] = (),
) -> set[str]:
    """Compare the flags of a run with those of the checkpoint that it resumes; log and return the names that differ.

    A flag that the checkpoint does not record is not compared. Those in `fixed` must not differ; those in `confirmable`
    may if they are among the `confirmed` (`--allow_changes`). Otherwise a `CheckpointError` has both values.
    """
    changed = {
        name: f"--{name} {old[name]} there, {value} here"
        for name, value in new.items()
        if name in old and not _equal(name, old[name], value)
    }
    if refused := [text for name, text in changed.items() if name in fixed]:
        raise CheckpointError(
            f"{checkpoint} was trained with other flags, which determine its weights and optimizer state: "
            f"{'; '.join(refused)}. Restore them, or start a new run in its own --output_dir "
            "(--resume_from_checkpoint False starts one here)"
        )
    if unconfirmed := [name for name in changed if name in confirmable and name not in confirmed]:
        raise CheckpointError(
            f"{checkpoint} was trained with other flags: {'; '.join(changed[name] for name in unconfirmed)}. Restore "
            f"them, confirm the change by --allow_changes {' '.join(unconfirmed)}, or start a new run in its own "
            "--output_dir (--resume_from_checkpoint False starts one here)"
        )
    if changed:
        logger.warning("flags that differ from those of %s: %s", checkpoint, "; ".join(changed.values()))
    return set(changed)


def _equal(name: str, old: Any, new: Any) -> bool:
    if name not in MODELS or not (isinstance(old, str) and isinstance(new, str)):
        return old == new
    # Models on the Hub and checkpoints of earlier versions have no checksum.
    (old_name, _, old_sum), (new_name, _, new_sum) = old.partition(_CHECKSUM), new.partition(_CHECKSUM)
    return old_name == new_name and (old_sum == new_sum or not (old_sum and new_sum))
