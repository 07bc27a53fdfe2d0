"""Parameter groups, their learning rates, and the square-root rule of the training guide.

The schedule is that of Transformers: `lr_scheduler_type`, by default cosine, after a warm-up of `warmup_ratio` (3 %) of
the steps. Its defaults are set in `arguments/training.py`; `base_trainer.py` restores it when a run resumes.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:  # these take seconds to import, and `metamorph lr` does not need them
    from torch import nn

    from metamorph.data.batching.packing import BatchPlanner
    from metamorph.training.arguments import MetaMorphTrainingArguments
    from metamorph.training.arguments.shared import RunTrainingArguments
    from metamorph.training.stages import ModuleSummary


logger = logging.getLogger(__name__)

LANGUAGE_MODEL = "language_model"
CONNECTOR = "mm_projector"
VISION_HEAD = "vision_head"
VISION_TOWER = "vision_tower"
MODULES = (LANGUAGE_MODEL, CONNECTOR, VISION_HEAD, VISION_TOWER)


SHARDABLE = ("adamw_torch", "adamw_torch_fused", "adamw_torch_8bit", "sgd", "rmsprop")
"""Optimizers that work on FSDP2's DTensors. Tried and failed: Adafactor, Adagrad and those of bitsandbytes."""


def scale_learning_rate(base_lr: float, base_batch: float, batch: float) -> float:
    """Learning rate for another number of samples per optimizer step: `base_lr * sqrt(batch / base_batch)`."""
    for name, value in (("base learning rate", base_lr), ("base batch size", base_batch), ("batch size", batch)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"the {name} {value} must be a finite number larger than 0")
    return base_lr * math.sqrt(batch / base_batch)


def samples_per_step(planner: BatchPlanner, gradient_accumulation_steps: int) -> float:
    """Samples per optimizer step, averaged over an epoch: rows of all processes × samples per row."""
    rows = planner.rows_per_batch * planner.world_size * gradient_accumulation_steps
    return rows * len(planner.lengths) / max(planner.num_rows, 1)


def apply_learning_rate_rule(args: MetaMorphTrainingArguments, samples: float) -> str | None:
    """Replace `--learning_rate auto` by the value of the rule for this number of samples per step, and log it.

    Rates of single modules (`--mm_projector_lr`, …) do not change. Returns the log line, if the rate is `auto`.
    """
    if not isinstance(args.learning_rate, str):  # "auto", the only word that the flags allow
        return None
    base, base_batch = args.base_learning_rate, args.base_batch_size
    assert base is not None  # checked with the flags
    assert base_batch is not None
    args.learning_rate = scale_learning_rate(base, base_batch, samples)
    done = (
        f"learning rate {args.learning_rate:.3g} = {base:g} × √({samples:.6g} / {base_batch}): --base_learning_rate "
        "scaled from --base_batch_size to the samples per step (--learning_rate auto)"
    )
    logger.info("%s", done)
    return done


def module_of(parameter_name: str) -> str:
    """The one of `MODULES` that a parameter of `model.named_parameters()` belongs to.

    The weights of the reduction (`mlpmixer`) and the rows of the new tokens count as connector: they are new in stage 1
    and trained and saved with it.
    """
    if parameter_name.startswith(("model.mm_projector.", "model.vision_tower.reduction.")):
        return CONNECTOR
    if parameter_name.endswith(".new_rows"):
        return CONNECTOR
    if parameter_name.startswith("model.vision_tower."):
        return VISION_TOWER
    return VISION_HEAD if parameter_name.startswith("vision_head.") else LANGUAGE_MODEL


def learning_rates(args: MetaMorphTrainingArguments) -> dict[str, float]:
    """Peak learning rate of each module."""
    own = {CONNECTOR: args.mm_projector_lr, VISION_HEAD: args.vision_head_lr, VISION_TOWER: args.vision_lr}
    given: dict[str, float] = {module: rate for module, rate in own.items() if rate is not None}
    return {module: given.get(module, float(args.learning_rate)) for module in MODULES}


def optimizer_groups(
    model: nn.Module,
    group_of: Callable[[str], str],
    rates: Mapping[str, float],
    weight_decay: float,
    no_decay: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Parameter groups for a PyTorch optimizer: by module, each with and without weight decay, without empty ones."""
    groups: dict[str, dict[str, Any]] = {
        name: {"name": name, "params": [], "lr": rate, "weight_decay": decay}
        for module, rate in rates.items()
        for name, decay in ((module, weight_decay), (f"{module}_no_decay", 0.0))
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = group_of(name)
            groups[f"{group}_no_decay" if name in no_decay else group]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]


def check_optimizer(args: RunTrainingArguments) -> None:
    """Check that the optimizer is installed, accepts its arguments and works with the engine."""
    from transformers import Trainer  # takes seconds
    from transformers.training_args import OptimizerNames

    name = OptimizerNames(args.optim).value
    if args.fsdp and name not in SHARDABLE:
        raise ValueError(
            f"--optim {name} is not known to work with FSDP2, whose weights are DTensors: use one of "
            f"{', '.join(SHARDABLE)}, or --sharding zero2"
        )
    plain = copy.copy(args)
    plain.optim_args = None
    try:
        optimizer = Trainer.get_optimizer_cls_and_kwargs(args)
        if args.optim_args and optimizer == Trainer.get_optimizer_cls_and_kwargs(plain):
            raise ValueError(f"it has no effect with --optim {name}: drop it")
    except ImportError as error:
        raise ModuleNotFoundError(f"--optim {name}: {error}") from error
    except ValueError as error:
        flag = f"--optim_args {args.optim_args}" if args.optim_args else f"--optim {name}"
        raise ValueError(f"{flag} cannot be used: {error}") from error


def keep_embeddings_in_32_bits(model: nn.Module) -> None:
    """Keep the state of embedding tables and new rows in 32 bits under bitsandbytes' optimizers, as Trainer does."""
    from bitsandbytes.optim import GlobalOptimManager
    from torch import nn

    from metamorph.models.embeddings import NewTokenEmbedding, NewTokenHead

    manager = GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})
        elif isinstance(module, (NewTokenEmbedding, NewTokenHead)):
            manager.register_module_override(module, "new_rows", {"optim_bits": 32})


def format_summary(summary: list[ModuleSummary], args: MetaMorphTrainingArguments) -> str:
    """The table of trained parameters, for the log."""
    rates = learning_rates(args)
    lines = [f"{'module':<16}{'trained':>16}{'frozen':>16}{'learning rate':>16}"]
    for line in summary:
        rate = f"{rates[line.module]:.3g}" if line.trainable else "-"
        lines.append(f"{line.module:<16}{line.trainable:>16,}{line.frozen:>16,}{rate:>16}")
    return "\n".join(lines)
