"""Which samples a run trained on: read from what reached the model."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback

from metamorph.training import run
from metamorph.training.trainer import MetaMorphTrainer


NUMBER = re.compile(r"\((\d+)\)")
"""How the records of `make_records` name themselves in their text."""

TWO_EPOCHS = {
    "from_scratch_connector": True,
    "packing": True,
    "model_max_length": 128,
    "per_device_train_batch_size": 1,
    "num_train_epochs": 2,
    "max_steps": -1,
    "save_strategy": "steps",
    "save_steps": 1,
    "warmup_ratio": 0,
    "learning_rate": 1e-3,
}
"""A packed run whose rows hold a few samples each; a checkpoint after every step."""


@contextmanager
def recorded() -> Iterator[list[list[int]]]:
    """Note the numbers of the samples of every optimizer step of the runs inside, in the order of the batches."""
    steps: list[list[int]] = []

    class Recording(MetaMorphTrainer):
        def get_batch_samples(self, *args: Any) -> Any:
            batches, count = super().get_batch_samples(*args)
            texts = [self.processing_class.tokenizer.decode(row) for batch in batches for row in batch["input_ids"]]
            steps.append([int(number) for text in texts for number in NUMBER.findall(text)])
            return batches, count

    run.MetaMorphTrainer = Recording
    try:
        yield steps
    finally:
        run.MetaMorphTrainer = MetaMorphTrainer


class Killed(Exception):
    """The run ends here, without saving anything more."""


class KillAfter(TrainerCallback):
    """Ends a run as a crash does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise Killed
