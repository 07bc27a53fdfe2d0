"""The moving average of the weights, with which a visualizer is saved."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import nn
from transformers import TrainerCallback

from metamorph.visualizer_training.fsdp2 import gather, shard_like


AVERAGE_FILE = "moving_average.pt"


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters by name."""
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


class MovingAverage(TrainerCallback):
    """diffusers' `EMAModel` of the trained weights of `model`, which may be sharded once training has begun."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = model
        self.decay = decay

    @cached_property
    def average(self) -> EMAModel:
        """The average, which starts from the weights that the model has at the first access."""
        return EMAModel(self.parameters, decay=self.decay, foreach=True)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The averaged parameters, which an engine may have replaced."""
        return list(trainable_parameters(self.model).values())

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start from the weights before the first step."""
        _ = self.average

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Add the weights of a step."""
        self.average.step(self.parameters)

    def save(self, folder: Path, *, keep: bool) -> None:
        """Write the unsharded average. All processes must call it; those with `keep` write."""
        values = gather(self.average.state_dict(), keep=keep)
        if keep:
            torch.save(values, folder / AVERAGE_FILE)

    def load(self, folder: Path) -> None:
        """Read the file of `save`; the decay stays that of this run."""
        values = torch.load(folder / AVERAGE_FILE, map_location="cpu", weights_only=True)
        shadows = zip(values["shadow_params"], self.parameters, strict=True)
        values["shadow_params"] = [shard_like(*pair) for pair in shadows]
        self.average.load_state_dict(values)
        self.average.to(device=self.parameters[0].device)
        self.average.decay = self.decay

    def gather(self, *, keep: bool) -> dict[str, torch.Tensor]:
        """The averages by parameter name. All processes must call it; those with `keep` get them unsharded."""
        return dict(zip(trainable_parameters(self.model), gather(self.average.shadow_params, keep=keep), strict=True))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Replace the model's weights by the averages within the context."""
        self.average.store(self.parameters)
        self.average.copy_to(self.parameters)
        try:
            yield
        finally:
            self.average.restore(self.parameters)
