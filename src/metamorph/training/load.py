"""Loads the model of a run: in every process, or with FSDP2 in the first one, which sends them to the others."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoModel, AutoModelForCausalLM, set_seed

from metamorph.models.modeling_metamorph import MetaMorphForConditionalGeneration
from metamorph.models.pretrained import load_tokenizer
from metamorph.runs.checkpoint_files import on_first_process
from metamorph.training.arguments import ModelArguments, RunArguments
from metamorph.training.build import ModelSpec, config_overrides, load_model
from metamorph.training.engines.prepare import gathered_weights, prepare_engine, reads_on_first_process
from metamorph.training.stages import apply_stage


def load_for_engine(args: RunArguments, spec: ModelSpec) -> tuple[MetaMorphForConditionalGeneration, str]:
    """Decide on the engine, load the model as it needs it, and return both. Every process must call it.

    With FSDP2 only the first process reads weights. In the others, only the vision tower has any until Accelerate
    prepares the model; the rest is on the meta device.
    """
    training, outline = args.training, None
    if training.fsdp or (training.world_size > 1 and training.deepspeed_plugin is None):
        outline = build_outline(args.model, spec)
        apply_stage(outline, args.model)
    engine = prepare_engine(args, outline)
    set_seed(training.seed)  # for the initial weights of connector and vision head
    if reads_on_first_process(training):
        return _load_on_first_process(args, spec), engine
    with gathered_weights(training):
        return load_model(args.model, spec, args.compute_dtype), engine


def build_outline(args: ModelArguments, spec: ModelSpec, **kwargs: Any) -> MetaMorphForConditionalGeneration:
    """Compose the model as `load_model` does, in float32, on PyTorch's meta device; no weight file is opened.

    Its parameters can be counted and frozen by `apply_stage`, but it cannot run. `kwargs` are those of `from_config`,
    for the language model.
    """
    config, kwargs = copy.deepcopy(spec.config), {"dtype": torch.float32, **kwargs}
    with torch.device("meta"):
        if spec.is_metamorph:
            return MetaMorphForConditionalGeneration._from_config(config, **kwargs)
        language_model = AutoModelForCausalLM.from_config(config.text_config, trust_remote_code=False, **kwargs)
        vision_encoder = AutoModel.from_config(config.vision_config, dtype=torch.float32, trust_remote_code=False)
        # The processor's tokenizer already has the image tokens; from_parts adds their rows as in a run.
        tokenizer = load_tokenizer(args.model_name_or_path)
        return MetaMorphForConditionalGeneration.from_parts(
            language_model, vision_encoder, tokenizer, **config_overrides(args)
        )


def _load_on_first_process(args: RunArguments, spec: ModelSpec) -> MetaMorphForConditionalGeneration:
    """The model on the first process; on the others an outline with everything that FSDP2 does not shard."""
    loaded: list[MetaMorphForConditionalGeneration] = []

    def load() -> tuple[Any, ...]:
        loaded.append(load_model(args.model, spec, args.compute_dtype))
        buffers = dict(loaded[0].named_buffers(remove_duplicate=False))
        return buffers, loaded[0].model.vision_tower.state_dict(), loaded[0].generation_config

    buffers, tower, generation_config = on_first_process(load)
    if loaded:
        return loaded[0]
    attention = args.model.attn_implementation
    model = build_outline(args.model, spec, **({} if attention is None else {"attn_implementation": attention}))
    for name, value in buffers.items():
        module, _, buffer = name.rpartition(".")
        setattr(model.get_submodule(module), buffer, value)
    model.model.vision_tower.load_state_dict(tower, assign=True)
    model.generation_config = generation_config
    return model
