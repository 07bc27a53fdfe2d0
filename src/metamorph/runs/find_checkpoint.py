"""Finds the checkpoint to resume from: the one asked for, or the newest undamaged one in the output folder."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from metamorph.runs.checkpoint_files import checkpoints, find_damage, on_first_process


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ResumePoint:
    """Where a run resumes."""

    step: int
    """Optimizer step, in steps of this run: after that many of them, as much data has been trained on."""
    epoch: int
    """Number of the epoch."""
    trained_rows: int
    """Rows (or samples) of that epoch already trained on. The first step may have fewer rows because of them."""
    rescales_steps: bool
    """Whether the steps of the checkpoint had another number of rows, so that `step` is not the checkpoint's."""


def find_checkpoint(
    output_dir: str,
    request: str | bool | None,
    check: Callable[[str], None],
    result_file: str,
    *,
    saves_on_each_node: bool = False,
) -> str | None:
    """The checkpoint to resume from, found by the first process for all.

    Args:
        output_dir: Folder of the run.
        request: None or "latest": the last checkpoint written to `output_dir` that is complete and undamaged, if any.
            "True": the same, but there must be one. "False": none. Otherwise the path of a checkpoint.
        check: Raises a `ValueError` for an undamaged checkpoint of another kind of run.
        result_file: A file that a finished run leaves in `output_dir`; a warning says that it will be replaced.
        saves_on_each_node: Whether the command has the flag `--save_on_each_node`, which an error then recommends.
    """
    folder = on_first_process(lambda: _find(output_dir, str(request), check, result_file))
    if folder is not None and not Path(folder).is_dir():
        raise FileNotFoundError(
            f"{folder} is visible to the first process but not to process {dist.get_rank()} on this machine: put "
            "--output_dir on storage that all machines share"
            + (", or write to each with --save_on_each_node True" if saves_on_each_node else "")
        )
    return folder


def _find(output_dir: str, request: str, check: Callable[[str], None], result_file: str) -> str | None:
    folders = checkpoints(output_dir)
    if request.lower() == "false":
        if folders:
            logger.warning("starting from the beginning next to old checkpoints: resuming later uses %s", folders[-1])
        return None
    if request.lower() not in ("none", "latest", "true"):
        folder = Path(request).expanduser()
        problem = find_damage(folder)
        if problem is not None:
            kind = ValueError if folder.is_dir() else FileNotFoundError
            raise kind(
                f"--resume_from_checkpoint {request} is not a complete checkpoint: {problem}. Give a checkpoint-… "
                "folder of this command, or True for the newest undamaged one in --output_dir"
            )
        check(str(folder))
        return str(folder)
    for folder in reversed(folders):
        problem = find_damage(folder)
        if problem is None:
            logger.info("resuming from %s (--resume_from_checkpoint False starts from the beginning)", folder)
            check(str(folder))
            return str(folder)
        logger.warning("skipping the checkpoint %s: %s", folder, problem)
    if request.lower() == "true":
        raise FileNotFoundError(f"--resume_from_checkpoint True: there is no checkpoint in --output_dir {output_dir}")
    if folders:
        logger.warning("no checkpoint in %s is usable: starting from the beginning", output_dir)
    elif (Path(output_dir) / result_file).is_file():
        logger.warning("%s holds a result and no checkpoint: it is trained again and replaced", output_dir)
    return None
