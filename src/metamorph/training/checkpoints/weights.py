"""The weights of checkpoints, and which checkpoint a run resumes from."""

import copy
import logging
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from metamorph.models.adapters import is_adapter_folder
from metamorph.models.connector import is_full_model
from metamorph.runs.checkpoint_files import checkpoints, damage, on_first_process


logger = logging.getLogger(__name__)

TRAINER_STATE_FILE = "trainer_state.json"


@torch.no_grad()
def load_weights(model: PreTrainedModel, folder: str | Path) -> None:
    """Load a full checkpoint into `model`, in place, in the precision of each of its weights; every one must be there.

    The files are read by `from_pretrained`, since the names in them are not always those of `model.state_dict()`:
    Transformers renames, splits and joins the weights of some models (DINOv2, mixtures of experts) when it saves.

    Args:
        model: A model of the same configuration.
        folder: Folder with `model.safetensors` or shards of it.

    Raises:
        ValueError: if weights are missing, unknown, of another shape, or not finite.
    """
    # Not in `model.dtype`, which is that of its first weight: of a frozen tower, in bfloat16 beside float32.
    loaded = type(model).from_pretrained(folder, config=copy.deepcopy(model.config), dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())


def find_checkpoint(output_dir: str, request: str | bool | None, stage: int, adapter: bool = False) -> str | None:
    """The checkpoint to resume from; with several processes, the first looks for it and tells the others.

    Args:
        output_dir: Folder of the run.
        request: None: the checkpoint in `output_dir` that was written last and is complete and undamaged, if any.
            "True": the same, but there must be one. "False": none. Otherwise the path of a checkpoint.
        stage: Stage of this run; a checkpoint of the other stage is an error.
        adapter: Whether this run trains an adapter (`--lora_enable True`); a checkpoint of the other kind is an error.

    Raises:
        FileNotFoundError: if the checkpoint asked for does not exist, or is not on storage that all machines share.
        ValueError: if the checkpoint asked for is damaged, or belongs to the other stage.
    """
    folder = on_first_process(lambda: _find(output_dir, request, stage, adapter))
    if folder is not None and not Path(folder).is_dir():
        raise FileNotFoundError(
            f"{folder} is seen by the first process but not by process {dist.get_rank()} on this machine: put "
            "--output_dir on storage that all machines share, or write to each with --save_on_each_node True"
        )
    return folder


def _find(output_dir: str, request: str | bool | None, stage: int, adapter: bool) -> str | None:
    choice = str(request)
    folders = checkpoints(output_dir)
    if choice.lower() == "false":
        if folders:
            logger.warning("starting anew beside old checkpoints: a later resume would take %s", folders[-1])
        return None
    if choice.lower() not in ("none", "true"):
        problem = damage(choice)
        if problem is not None:
            kind = ValueError if Path(choice).is_dir() else FileNotFoundError
            raise kind(
                f"--resume_from_checkpoint {choice} is not a complete checkpoint: {problem}. Give a checkpoint-… "
                "folder of this command, or True for the newest undamaged one in --output_dir"
            )
        return _of_run(choice, stage, adapter)
    for folder in reversed(folders):
        problem = damage(folder)
        if problem is None:
            logger.info("resuming from %s (--resume_from_checkpoint False starts anew)", folder)
            return _of_run(str(folder), stage, adapter)
        logger.warning("skipping the checkpoint %s: %s", folder, problem)
    if choice.lower() == "true":
        raise FileNotFoundError(f"--resume_from_checkpoint True: there is no checkpoint in --output_dir {output_dir}")
    if folders:
        logger.warning("no checkpoint in %s is usable: starting anew", output_dir)
    return None


def _of_run(folder: str, stage: int, adapter: bool) -> str:
    found_adapter = is_adapter_folder(folder)
    found = 2 if found_adapter or is_full_model(folder) else 1
    if found != stage:
        raise ValueError(
            f"{folder} is a checkpoint of stage {found}, but this run is stage {stage}: give each stage its own "
            "--output_dir, or start anew with --resume_from_checkpoint False"
        )
    if found_adapter != adapter:
        raise ValueError(
            f"{folder} is a checkpoint with --lora_enable {found_adapter}, but this run has --lora_enable {adapter}: "
            "give each its own --output_dir, or start anew with --resume_from_checkpoint False"
        )
    return folder
