"""The weights of a checkpoint, read back into a model."""

import copy
import logging
from pathlib import Path

import torch
from transformers import PreTrainedModel

from metamorph.training.engines.weights import TOWER


logger = logging.getLogger(__name__)

ARGUMENTS_FILE = "training_args.json"
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
    state = loaded.state_dict()
    if "vision_tower" in vars(model.model):  # out of the tree of modules, see `FrozenTower`; it has not changed
        state = {name: weight for name, weight in state.items() if not name.startswith(f"{TOWER}.")}
    model.load_state_dict(state)
