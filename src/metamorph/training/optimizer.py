"""Parameter groups, their learning rates, and the square-root rule of the training guide.

The schedule is Transformers' own: `lr_scheduler_type`, by default cosine, after a warm-up of `warmup_ratio` (3 %) of
the steps. Its defaults are set in `arguments/training.py`; `base_trainer.py` restores it at a resume.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:  # `metamorph lr` needs none of them, and they take seconds to import
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


def scale_learning_rate(base_lr: float, base_batch: float, batch: float) -> float:
    """Learning rate for another global batch size: `base_lr * sqrt(batch / base_batch)`.

    Args:
        base_lr: Learning rate known to work at `base_batch`.
        base_batch: Samples per optimizer step it was tuned for.
        batch: Samples per optimizer step of the new run.

    Raises:
        ValueError: for a value that is not larger than 0.
    """
    for name, value in (("base learning rate", base_lr), ("base batch size", base_batch), ("batch size", batch)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"the {name} {value} must be a finite number larger than 0")
    return base_lr * math.sqrt(batch / base_batch)


def samples_in_a_step(planner: BatchPlanner, gradient_accumulation_steps: int) -> float:
    """Samples of one optimizer step, on average over an epoch: rows of all processes × samples in a row.

    Args:
        planner: Plans the run's batches.
        gradient_accumulation_steps: Micro-batches of a step.
    """
    rows = planner.rows_per_batch * planner.world_size * gradient_accumulation_steps
    return rows * len(planner.lengths) / max(planner.num_rows, 1)


def apply_learning_rate_rule(args: MetaMorphTrainingArguments, samples: float) -> str | None:
    """Replace `--learning_rate auto` by the rule's value, and say so in the log.

    Rates of single modules (`--mm_projector_lr`, …) stay as they are given.

    Args:
        args: How the run learns; `learning_rate` becomes a number.
        samples: Samples in an optimizer step.

    Returns:
        What was done, in one line; None if the rate is given as a number.
    """
    if not isinstance(args.learning_rate, str):  # the flags allow no other word than "auto"
        return None
    base, base_batch = args.base_learning_rate, args.base_batch_size
    assert base is not None  # checked with the flags
    assert base_batch is not None
    args.learning_rate = scale_learning_rate(base, base_batch, samples)
    done = (
        f"learning rate {args.learning_rate:.3g} = {base:g} × √({samples:.6g} / {base_batch}): --learning_rate auto "
        "from --base_learning_rate, for the samples in a step and --base_batch_size"
    )
    logger.info("%s", done)
    return done


def module_of(parameter_name: str) -> str:
    """The member of `MODULES` that a parameter belongs to.

    The reduction's weights (`mlpmixer`) and the new tokens' rows count as connector: they are new in stage 1 and are
    trained and saved with it.

    Args:
        parameter_name: Name as in `model.named_parameters()`.
    """
    if parameter_name.startswith(("model.mm_projector.", "model.vision_tower.reduction.")):
        return CONNECTOR
    if parameter_name.endswith(".new_rows"):
        return CONNECTOR
    if parameter_name.startswith("model.vision_tower."):
        return VISION_TOWER
    return VISION_HEAD if parameter_name.startswith("vision_head.") else LANGUAGE_MODEL


def learning_rates(args: MetaMorphTrainingArguments) -> dict[str, float]:
    """Peak learning rate of each module; `learning_rate` where no own rate is given."""
    own = {CONNECTOR: args.mm_projector_lr, VISION_HEAD: args.vision_head_lr, VISION_TOWER: args.vision_lr}
    given: dict[str, float] = {module: rate for module, rate in own.items() if rate is not None}
    return {module: given.get(module, float(args.learning_rate)) for module in MODULES}


def optimizer_groups(
    model: nn.Module,
    module_of: Callable[[str], str],
    rates: Mapping[str, float],
    weight_decay: float,
    no_decay: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Parameter groups by module, each with and without weight decay; empty ones are left out.

    Args:
        model: What is trained requires a gradient.
        module_of: The module of a parameter, by its name.
        rates: Peak learning rate of each module.
        weight_decay: Of the parameters that decay.
        no_decay: Names of the parameters that do not.

    Returns:
        Groups for a PyTorch optimizer, each with a `name`.
    """
    groups: dict[str, dict[str, Any]] = {
        name: {"name": name, "params": [], "lr": rate, "weight_decay": decay}
        for module, rate in rates.items()
        for name, decay in ((module, weight_decay), (f"{module}_no_decay", 0.0))
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[module_of(name) + "_no_decay" * (name in no_decay)]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]


def check_optimizer(args: RunTrainingArguments) -> None:
    """Find out before the weights are loaded whether the optimizer is installed and reads its arguments.

    Args:
        args: `optim` and `optim_args`.

    Raises:
        ModuleNotFoundError: if the package of the optimizer is missing.
        ValueError: if `optim_args` are not `name=value,…`, or change nothing.
    """
    from transformers import Trainer  # takes seconds, which a dry run does not need
    from transformers.training_args import OptimizerNames

    name = OptimizerNames(args.optim).value
    plain = copy.copy(args)
    plain.optim_args = None
    try:
        optimizer = Trainer.get_optimizer_cls_and_kwargs(args)
        if args.optim_args and optimizer == Trainer.get_optimizer_cls_and_kwargs(plain):
            raise ValueError(f"it changes nothing with --optim {name}: leave it out")
    except ImportError as error:
        raise ModuleNotFoundError(f"--optim {name}: {error}") from error
    except ValueError as error:
        flag = f"--optim_args {args.optim_args}" if args.optim_args else f"--optim {name}"
        raise ValueError(f"{flag} cannot be used: {error}") from error


def keep_embeddings_in_32_bits(model: nn.Module) -> None:
    """Exempt embedding tables from the 8-bit state of bitsandbytes' optimizers, as Trainer does; and rows of them.

    Args:
        model: What is trained, before the first step.
    """
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
    """The table of what is trained, as text for the log."""
    rates = learning_rates(args)
    lines = [f"{'module':<16}{'trained':>16}{'frozen':>16}{'learning rate':>16}"]
    for line in summary:
        rate = f"{rates[line.module]:.3g}" if line.trainable else "-"
        lines.append(f"{line.module:<16}{line.trainable:>16,}{line.frozen:>16,}{rate:>16}")
    return "\n".join(lines)
