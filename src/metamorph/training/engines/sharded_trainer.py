"""`transformers.Trainer` on any engine: the frozen tower outside of what is sharded, and whole weights when saving."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer
from transformers.trainer_utils import TrainOutput

from metamorph.training.engines.prepare import FrozenTower, gather_weights


class ShardedTrainer(Trainer):
    """`transformers.Trainer` that writes the same folder whatever the engine.

    Args:
        **kwargs: As for `transformers.Trainer`.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.plain_model = self.model  # FSDP2 and torch.compile may put others in its place
        self.frozen_tower: FrozenTower | None = None

    @property
    def is_sharded(self) -> bool:
        """Whether the weights of the model are now those of an engine: divided among processes, or DeepSpeed's."""
        if self.is_deepspeed_enabled:
            return self.model_wrapped is not self.plain_model
        return isinstance(self.plain_model, FSDPModule)

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> TrainOutput:
        """Train, with the frozen vision tower in its place.

        Args:
            resume_from_checkpoint: Folder of a checkpoint.
            **kwargs: As for `transformers.Trainer.train`.
        """
        if self.frozen_tower is None:
            self.frozen_tower = FrozenTower(
                self.plain_model,
                dtype=torch.bfloat16 if self.args.bf16 else None,
                device=self.args.device,
                outside=self.is_fsdp_enabled or self.is_deepspeed_enabled,
                keep=self.args.should_save,
            )
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def whole_state_dict(self) -> dict[str, Tensor]:
        """The weights as one process would have them. Every process must call it; only those that save get them."""
        keep = self.args.should_save
        state = gather_weights(self.plain_model, keep=keep) if self.is_sharded else self.plain_model.state_dict()
        return state if self.frozen_tower is None else state | self.frozen_tower.state_dict()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what the stage trains as a plain folder. Every process must call it.

        Trainer has a way of its own for each engine, some of which write shards only, or weights in bfloat16.

        Args:
            output_dir: By default the folder of the run.
            _internal_call: Set by Trainer for checkpoints, which it pushes to the Hub itself.
        """
        self._save(output_dir or self.args.output_dir, state_dict=self.whole_state_dict())
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def release_tower(self) -> None:
        """Make the vision tower of the trained model whole again, with the weights that it was loaded with.

        On processes that do not save they stay in the precision of the computation.
        """
        if self.frozen_tower is not None:
            self.frozen_tower.restore()
            self.frozen_tower = None
