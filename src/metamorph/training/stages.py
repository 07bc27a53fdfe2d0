"""Which parameters each stage trains."""

import logging
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from metamorph.models.embeddings import attach_new_head_rows, attach_new_token_rows
from metamorph.training.arguments import MetaMorphTrainingArguments, ModelArguments
from metamorph.training.lora import LANGUAGE_MODEL_PREFIX, attach_lora, is_lora
from metamorph.training.optimizer import CONNECTOR, LANGUAGE_MODEL, MODULES, VISION_HEAD, VISION_TOWER, module_of


logger = logging.getLogger(__name__)

KNOWN_RATES = {
    "stage 1": ("1e-3", 256, "LLaVA-1.5's connector"),
    "stage 2": ("6.93e-5", 1536, "The training guide"),
    "LoRA": ("2e-4", 16, "QLoRA"),
}
"""What is trained -> a learning rate, its samples in a step, and its source: those of the recipes."""


@dataclass(frozen=True)
class ModuleSummary:
    """One line of the table of what is trained."""

    module: str
    """One of `MODULES`."""
    trainable: int
    """Number of trained parameters."""
    frozen: int
    """Number of parameters that stay as they are."""


def apply_stage(model: PreTrainedModel, args: ModelArguments) -> list[ModuleSummary]:
    """Freeze everything that the stage does not train.

    Stage 1 trains the connector and the embedding rows of the new tokens, which become a parameter of their own.
    Stage 2 trains the language model and the connector. In both stages the vision head is trained if there is a visual
    loss (`use_vision_ar`, by default in stage 2 only): without one it would never have a gradient. With `lora_enable`,
    LoRA matrices and the rows of the new tokens are trained in the place of the language model. Weights of a language
    model that never have a gradient, such as biases that choose experts, are frozen: parallel training stops at them.

    Args:
        model: A MetaMorph model; changed in place.
        args: The stage (`tune_mm_mlp_adapter`) and the `freeze_…` flags.

    Returns:
        What is trained, one entry for each module.

    Raises:
        ValueError: if the flags leave nothing to train.
    """
    trained = {
        LANGUAGE_MODEL: args.stage == 2 and not args.freeze_backbone and not args.lora_enable,
        CONNECTOR: args.stage == 1 or not args.freeze_mm_mlp_adapter,
        VISION_HEAD: model.config.use_vision_ar,
        VISION_TOWER: args.stage == 2 and not args.freeze_vision,
    }
    if args.lora_enable:
        attach_lora(model, args)
    verdict = model.check_language_model(model.config.text_config)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():  # weights in 4 bits are not
            learns = trained[module_of(name)] and verdict.uses(name.removeprefix(LANGUAGE_MODEL_PREFIX))
            parameter.requires_grad_(learns or is_lora(name))
    if args.stage == 1 or args.lora_enable:
        attach_new_token_rows(model)
    if args.lora_enable:
        attach_new_head_rows(model)
    summary = summarise(model)
    if not any(line.trainable for line in summary):
        raise ValueError(
            "nothing is left to train: --freeze_backbone, --freeze_mm_mlp_adapter, --freeze_vision and "
            "--use_vision_ar False together freeze every module; drop one of them"
        )
    return summary


def summarise(model: nn.Module) -> list[ModuleSummary]:
    """Count the trained and the frozen parameters of each module."""
    counts = {module: [0, 0] for module in MODULES}
    for name, parameter in model.named_parameters():
        counts[module_of(name)][0 if parameter.requires_grad else 1] += parameter.numel()
    return [ModuleSummary(module, *numbers) for module, numbers in counts.items()]


def check_learning_rates(model_args: ModelArguments, args: MetaMorphTrainingArguments) -> None:
    """Refuse the learning rate of a module that is not trained, and warn of one that nobody has chosen.

    Args:
        model_args: The stage and the `freeze_…` flags.
        args: The learning rates.

    Raises:
        ValueError: naming the rate and the flag that freezes its module.
    """
    frozen = {
        "mm_projector_lr": (model_args.freeze_mm_mlp_adapter, "--freeze_mm_mlp_adapter False"),
        "vision_lr": (model_args.freeze_vision, "--freeze_vision False"),
        "vision_head_lr": (
            # A finished model that is trained further may bring it.
            not model_args.resolved_use_vision_ar
            and not (model_args.continues_metamorph and model_args.use_vision_ar is None),
            "--use_vision_ar True",
        ),
    }
    for name, (is_frozen, flag) in frozen.items():
        if is_frozen and getattr(args, name) is not None:
            raise ValueError(
                f"--{name} {getattr(args, name)} has no effect: that module is not trained. Add {flag}, or leave the "
                "rate out"
            )
    is_chosen = args.is_given("learning_rate") or (model_args.stage == 1 and args.mm_projector_lr is not None)
    if not is_chosen and args.process_index == 0:
        what = "LoRA" if model_args.lora_enable else f"stage {model_args.stage}"
        rate, batch, source = KNOWN_RATES[what]
        logger.warning(
            "%s trains at %s, Transformers' default, since --learning_rate is not given. %s has %s for %d samples in a "
            "step: --learning_rate auto --base_learning_rate %s --base_batch_size %d",
            *(what, args.learning_rate, source, rate, batch, rate, batch),
        )
