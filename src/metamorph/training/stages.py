"""Which parameters each stage trains."""

import logging
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from metamorph.models.embeddings import attach_new_head_rows, attach_new_token_rows
from metamorph.training.arguments import ModelArguments, RunArguments
from metamorph.training.lora import LANGUAGE_MODEL_PREFIX, attach_lora
from metamorph.training.optimizer import CONNECTOR, LANGUAGE_MODEL, MODULES, VISION_HEAD, VISION_TOWER, module_of


logger = logging.getLogger(__name__)

KNOWN_RATES = {
    "stage 1": ("1e-3", 256, "LLaVA-1.5's connector"),
    "stage 2": ("6.93e-5", 1536, "The training guide"),
    "LoRA": ("2e-4", 16, "QLoRA"),
}
"""What is trained -> a learning rate, the samples per step it was tuned for, and its source; as in the recipes."""


@dataclass(frozen=True)
class ModuleSummary:
    """Numbers of trained and frozen parameters of one of `MODULES`."""

    module: str
    trainable: int
    frozen: int


def apply_stage(model: PreTrainedModel, args: ModelArguments) -> list[ModuleSummary]:
    """Freeze everything that the stage does not train, in place, and count what is trained.

    - Stage 1 trains the connector and the embedding rows of the new tokens, which become a separate parameter.
    - Stage 2 trains the language model and the connector. With `lora_enable`, it trains LoRA matrices and the rows of
      the new tokens instead of the language model.
    - The vision head is trained if there is a visual loss (`use_vision_ar`, by default in stage 2 only).

    Weights that never get a gradient, such as biases that choose experts, are frozen: data-parallel training would fail
    on them.

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
    support = model.check_language_model(model.config.text_config)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():  # 4-bit weights are not
            learns = trained[module_of(name)] and support.uses(name.removeprefix(LANGUAGE_MODEL_PREFIX))
            parameter.requires_grad_(learns or ".lora_" in name)
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


def check_learning_rates(args: RunArguments) -> None:
    """Refuse the learning rate of a module that is not trained, and warn about the default rate."""
    model_args, training_args = args.model, args.training
    frozen = {
        "mm_projector_lr": (model_args.freeze_mm_mlp_adapter, "--freeze_mm_mlp_adapter False"),
        "vision_lr": (model_args.freeze_vision, "--freeze_vision False"),
        "vision_head_lr": (
            # A model that is trained further may have a visual loss.
            not model_args.resolved_use_vision_ar
            and not (model_args.continues_metamorph and model_args.use_vision_ar is None),
            "--use_vision_ar True",
        ),
    }
    for name, (is_frozen, flag) in frozen.items():
        if is_frozen and getattr(training_args, name) is not None:
            raise ValueError(
                f"--{name} {getattr(training_args, name)} has no effect: that module is not trained. Add {flag}, or "
                "drop the rate"
            )
    is_chosen = training_args.is_given("learning_rate") or (
        model_args.stage == 1 and training_args.mm_projector_lr is not None
    )
    if not is_chosen and training_args.process_index == 0:
        what = "LoRA" if model_args.lora_enable else f"stage {model_args.stage}"
        rate, batch, source = KNOWN_RATES[what]
        logger.warning(
            "%s trains at %s, Transformers' default, since --learning_rate is not given. %s uses %s for %d samples per "
            "step: --learning_rate auto --base_learning_rate %s --base_batch_size %d",
            *(what, training_args.learning_rate, source, rate, batch, rate, batch),
        )
