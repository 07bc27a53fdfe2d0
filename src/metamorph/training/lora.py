"""LoRA and 4-bit weights of the language model: the flags as configurations of PEFT and bitsandbytes."""

import os

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from metamorph.models.adapters import (
    ADAPTER_NAME,
    PARTS_NOT_QUANTISED,
    AdapterBase,
    require_bitsandbytes,
    require_peft,
)
from metamorph.models.vision_tower import resolve_vision_tower
from metamorph.training.arguments import ModelArguments, RunArguments


LANGUAGE_MODEL_PREFIX = "model.language_model."


def attach_lora(model: PreTrainedModel, args: ModelArguments) -> None:
    """Add LoRA matrices to the linear layers of the language model, in place; PEFT freezes all other weights."""
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


def target_pattern(model: PreTrainedModel, wanted: list[str] | None) -> str:
    """The regular expression that PEFT matches against the full path of each module.

    Names alone, such as `q_proj` or `0`, would also match layers of the vision tower, the connector and the vision
    head. `wanted` None selects all linear layers of the language model.
    """
    language_model = model.get_decoder()
    linear = [name for name, module in language_model.named_modules() if isinstance(module, nn.Linear)]
    names = {name.rpartition(".")[2] for name in linear}
    unknown = sorted(set(wanted or ()) - names)
    if unknown or not names:
        raise ValueError(
            f"--lora_target_modules {' '.join(unknown)}: the {type(language_model).__name__} has no such linear "
            f"layers; it has {', '.join(sorted(names)) or 'none'}"
        )
    prefix = LANGUAGE_MODEL_PREFIX.replace(".", r"\.")
    return rf"{prefix}(.*\.)?({'|'.join(sorted(wanted or names))})"


def adapter_base(
    args: ModelArguments, continues_metamorph: bool, quantization: BitsAndBytesConfig | None
) -> AdapterBase:
    """The base of the adapter, with absolute paths, so that the adapter opens from any folder."""
    fields = {} if quantization is None else quantization.to_diff_dict()
    return AdapterBase(
        language_model=_absolute(args.model_name_or_path),
        vision_tower=None if continues_metamorph else _absolute(resolve_vision_tower(args.vision_tower)),
        # Transformers adds private fields.
        quantization={name: value for name, value in fields.items() if not name.startswith("_")} or None,
    )


def quantization_config(args: ModelArguments, compute_dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """How the language model is quantised; None without `--bits 4`."""
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


def check_engine(args: RunArguments) -> None:
    """Refuse 4-bit weights with an engine that shards weights."""
    shards = is_deepspeed_zero3_enabled() or args.training.fsdp or args.training.sharding == "fsdp2"
    if args.model.bits == 4 and shards:
        raise ValueError("--bits 4 does not work with sharded weights (FSDP2, ZeRO-3): use --sharding ddp or zero2")


def store_frozen_matrices(model: PreTrainedModel, args: RunArguments) -> None:
    """On a GPU, keep the frozen matrices of the language model in the precision of the computation.

    Autocast and FSDP2 round them to it in every step anyway, so this halves their memory and changes no result. Norms,
    embeddings and trained weights stay in float32. So does everything if the result contains the frozen matrices; on a
    CPU, so that the model can be used without autocast afterwards; and with DeepSpeed, which rounds by itself.
    """
    is_saved = args.model.stage == 2 and not args.model.lora_enable
    if is_saved or args.training.use_cpu or args.training.deepspeed:
        return
    for module in model.get_decoder().modules():
        if isinstance(module, nn.Linear) and not module.weight.requires_grad and module.weight.is_floating_point():
            module.to(args.compute_dtype)


def _absolute(name: str) -> str:
    return os.path.abspath(name) if os.path.isdir(name) else name
