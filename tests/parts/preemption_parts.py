"""Short runs that a signal interrupts."""

import os
import signal
from typing import Any

from transformers import TrainerCallback


FLAGS: dict[str, Any] = {
    "max_steps": 5,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "dataloader_num_workers": 1,
    "learning_rate": 1e-3,
}
CASES: dict[str, dict[str, Any]] = {
    "stage1": {"stage": 1},
    "stage2": {"stage": 2, "from_scratch_connector": True, "packing": True, "model_max_length": 128},
    "lora": {"stage": 2, "from_scratch_connector": True, "lora_enable": True, "lora_r": 4, "lora_dropout": 0.5},
}


class SignalIn(TrainerCallback):
    """Sends a signal to this process, on one rank only, between the micro-batches of a step."""

    def __init__(self, step: int, number: signal.Signals) -> None:
        self.step, self.number = step, number

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step - 1 and args.process_index == args.world_size - 1:
            os.kill(os.getpid(), self.number)
