"""Loads the weights of a checkpoint into a model."""

import copy
from pathlib import Path

import torch
from transformers import PreTrainedModel

from metamorph.training.engines.weights import TOWER


ARGUMENTS_FILE = "training_args.json"
TRAINER_STATE_FILE = "trainer_state.json"


@torch.no_grad()
def load_weights(model: PreTrainedModel, folder: str | Path) -> None:
    """Load a full checkpoint into a model of the same configuration, in place; each weight keeps its precision.

    `from_pretrained` reads the files, since the names in them are not always those of `model.state_dict()`:
    Transformers renames, splits and joins the weights of some models (DINOv2, mixtures of experts) when it saves.
    """
    # `model.dtype` is that of the first weight, which may be a frozen tower in bfloat16.
    loaded = type(model).from_pretrained(folder, config=copy.deepcopy(model.config), dtype=torch.float32)
    state = loaded.state_dict()
    if "vision_tower" in vars(model.model):  # outside of the module tree, see `FrozenTower`; unchanged
        state = {name: weight for name, weight in state.items() if not name.startswith(f"{TOWER}.")}
    model.load_state_dict(state)
