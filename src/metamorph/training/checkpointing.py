"""How the trainer saves, loads and resumes."""

import json
import logging
import math
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import Trainer, TrainerState
from transformers.trainer_utils import TrainOutput

from metamorph.models.adapters import has_adapter, load_adapter_weights, save_adapter
from metamorph.models.connector import load_connector, save_connector
from metamorph.training.checkpoint import TRAINER_STATE_FILE, load_weights


logger = logging.getLogger(__name__)


class CheckpointingTrainer(Trainer):
    """`transformers.Trainer` whose checkpoints hold what the stage trains and all that resuming needs."""

    stage: int

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> TrainOutput:
        """Train, or only load the weights of a checkpoint that is already at the last step.

        `transformers.Trainer` would do one step too many there (seen in 5.23, when the last step is not the last of
        an epoch), so that restarting a finished run would change its result.

        Args:
            resume_from_checkpoint: Folder of a checkpoint.
            **kwargs: As for `transformers.Trainer.train`.
        """
        if resume_from_checkpoint is not None:
            state = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / TRAINER_STATE_FILE))
            if self._is_finished(state):
                logger.info("%s is at the last step already: there is nothing left to train", resume_from_checkpoint)
                self._load_from_checkpoint(resume_from_checkpoint)
                self.state = state
                return TrainOutput(state.global_step, math.nan, {})
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _is_finished(self, state: TrainerState) -> bool:
        if self.args.max_steps > 0:
            return state.global_step >= self.args.max_steps
        return (state.epoch or 0) >= self.args.num_train_epochs

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write connector (stage 1) or model (stage 2), configuration and processor; the main process only."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        if self.stage == 1:
            save_connector(self.model, folder, state_dict)
            self.model.config.save_pretrained(folder)
        elif has_adapter(self.model):
            self.model.generation_config.eos_token_id = self.processing_class.end_of_turn_token_ids
            save_adapter(self.model, folder, self.model.adapter_base, state_dict)
        else:
            # Base language models name one end token; ours also end their turns.
            self.model.generation_config.eos_token_id = self.processing_class.end_of_turn_token_ids
            self.model.save_pretrained(folder, state_dict=state_dict)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        arguments = json.dumps(self.args.to_sanitized_dict(), indent=2, default=str)
        (folder / "training_args.json").write_text(arguments + "\n", encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        elif self.stage == 1:
            load_connector(self.model, resume_from_checkpoint)
        elif has_adapter(self.model):
            load_adapter_weights(self.model, resume_from_checkpoint)
        else:
            load_weights(self.model, resume_from_checkpoint)
