"""LoRA and 4-bit weights of the language model: from the flags to PEFT's and bitsandbytes' configurations."""

import logging
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from metamorph.models.adapters import (
    ADAPTER_NAME,
    PARTS_NOT_QUANTISED,
    AdapterBase,
    has_adapter,
    require_bitsandbytes,
    require_peft,
)
from metamorph.models.vision_tower import resolve_vision_tower


if TYPE_CHECKING:
    from metamorph.training.arguments import MetaMorphTrainingArguments
    from metamorph.training.arguments.model import ModelArguments


logger = logging.getLogger(__name__)

LANGUAGE_MODEL_PREFIX = "model.language_model."


def attach_lora(model: PreTrainedModel, args: "ModelArguments") -> None:
    """Put LoRA matrices beside the linear layers of the language model; all other weights are frozen by PEFT.

    The layers are named by their path from the model on: names alone, such as `q_proj` or `0`, are also those of
    layers of the vision tower, the connector and the vision head.

    Args:
        model: A MetaMorph model; changed in place.
        args: The `lora_…` flags.

    Raises:
        ModuleNotFoundError: if PEFT is not installed.
        ValueError: if `lora_target_modules` names a layer that the language model does not have.
    """
    require_peft()
    from peft import LoraConfig

    settings = LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        bias="none",
        target_modules=target_pattern(model, args.lora_target_modules),
    )
    model.add_adapter(settings, ADAPTER_NAME)


def is_lora(parameter_name: str) -> bool:
    """Whether a parameter belongs to a LoRA matrix.

    Args:
        parameter_name: Name as in `model.named_parameters()`.
    """
    return ".lora_" in parameter_name


def target_pattern(model: PreTrainedModel, wanted: list[str] | None) -> str:
    """The regular expression that PEFT matches against the whole path of each module.

    Args:
        model: A MetaMorph model.
        wanted: Names of linear layers, such as q_proj; None: all that the language model has.
    """
    language_model = model.get_decoder()
    linear = [name for name, module in language_model.named_modules() if isinstance(module, nn.Linear)]
    names = {name.rpartition(".")[2] for name in linear}
    unknown = sorted(set(wanted or ()) - names)
    if unknown or not names:
        raise ValueError(
            f"--lora_target_modules {' '.join(unknown)}: the {type(language_model).__name__} has no such linear "
            f"layers; it has {', '.join(sorted(names)) or 'none at all'}"
        )
    prefix = LANGUAGE_MODEL_PREFIX.replace(".", r"\.")
    return rf"{prefix}(.*\.)?({'|'.join(sorted(wanted or names))})"


def adapter_base(
    args: "ModelArguments", continues_metamorph: bool, quantization: BitsAndBytesConfig | None
) -> AdapterBase:
    """What the adapter belongs to, with whole paths, so that its folder opens from any other one.

    Args:
        args: The model flags.
        continues_metamorph: Whether the base is a finished MetaMorph model.
        quantization: Result of `quantization_config`.
    """
    return AdapterBase(
        language_model=_whole_path(args.model_name_or_path),
        vision_tower=None if continues_metamorph else _whole_path(resolve_vision_tower(args.vision_tower)),
        quantization=None if quantization is None else _public_fields(quantization),
    )


def quantization_config(args: "ModelArguments", compute_dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """How the language model is loaded: None, or in 4 bits.

    Args:
        args: The flags `bits`, `double_quant` and `quant_type`.
        compute_dtype: Precision of the matrix products.

    Raises:
        ModuleNotFoundError: if bitsandbytes is not installed.
    """
    if args.bits != 4:
        return None
    require_bitsandbytes()
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_use_double_quant=args.double_quant,
        bnb_4bit_quant_type=args.quant_type,
        llm_int8_skip_modules=list(PARTS_NOT_QUANTISED),
    )


def check_engine(model_args: "ModelArguments", training_args: "MetaMorphTrainingArguments") -> None:
    """Refuse 4-bit weights under an engine that shards weights, before anything is loaded.

    Args:
        model_args: The flag `bits`.
        training_args: The engine.

    Raises:
        ValueError: with `--bits 4` and ZeRO-3 or FSDP2.
    """
    shards = is_deepspeed_zero3_enabled() or training_args.fsdp or training_args.sharding == "fsdp2"
    if model_args.bits == 4 and shards:
        raise ValueError("--bits 4 does not work with sharded weights (FSDP2, ZeRO-3): use --sharding ddp or zero2")


def compute_dtype(args: "MetaMorphTrainingArguments") -> torch.dtype:
    """The precision that `bf16` and `fp16` choose for matrix products."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32


def store_frozen_matrices(model: PreTrainedModel, args: "MetaMorphTrainingArguments") -> None:
    """Beside an adapter on a GPU, keep the language model's frozen matrices in the precision they are computed in.

    Autocast rounds them to it in every step anyway, so this changes no result, and halves their memory. Norms,
    embeddings and everything that is trained stay in float32. On a CPU all stays in float32, so that the model can
    be used without autocast afterwards; and so it does where an engine shards weights, which needs them of one type.

    Args:
        model: A MetaMorph model after `apply_stage`; changed in place.
        args: How the run learns.
    """
    if not has_adapter(model) or args.use_cpu or args.fsdp or args.deepspeed:
        return
    for module in model.get_decoder().modules():
        if isinstance(module, nn.Linear) and not module.weight.requires_grad and module.weight.is_floating_point():
            module.to(compute_dtype(args))


def _whole_path(name: str) -> str:
    return os.path.abspath(name) if os.path.isdir(name) else name


def _public_fields(quantization: BitsAndBytesConfig) -> dict[str, Any]:
    """The arguments it was made with, for JSON."""
    return {name: value for name, value in quantization.to_diff_dict().items() if not name.startswith("_")}
