"""The model of a run without its weights: every parameter has its shape and takes no memory."""

from __future__ import annotations

import torch
from transformers import AutoModel, AutoModelForCausalLM

from metamorph.models.modeling_metamorph import MetaMorphForConditionalGeneration
from metamorph.models.pretrained import load_tokenizer
from metamorph.training.arguments.training import ModelArguments
from metamorph.training.build import Plan, config_overrides


def build_outline(args: ModelArguments, plan: Plan) -> MetaMorphForConditionalGeneration:
    """Compose the model as `load_model` would, in float32, on PyTorch's meta device; no weight file is opened.

    It can be counted, frozen by `apply_stage` and wrapped, but not run.

    Args:
        args: The model flags.
        plan: Result of `make_plan` for the same flags.
    """
    with torch.device("meta"):
        if plan.continues:
            return MetaMorphForConditionalGeneration(plan.config).float()
        language_model = AutoModelForCausalLM.from_config(
            plan.config.text_config, dtype=torch.float32, trust_remote_code=False
        )
        vision_encoder = AutoModel.from_config(plan.config.vision_config, dtype=torch.float32, trust_remote_code=False)
        # The processor's tokenizer has the image tokens already; the language model grows by them as in a run.
        tokenizer = load_tokenizer(args.model_name_or_path)
        return MetaMorphForConditionalGeneration.from_parts(
            language_model, vision_encoder, tokenizer, **config_overrides(args)
        )
