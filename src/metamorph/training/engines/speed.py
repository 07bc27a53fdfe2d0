"""Recomputation and compilation: less time or memory per step, the same result."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from metamorph.models.text_head import TextLossOptions
from metamorph.training.arguments import MetaMorphTrainingArguments


def prepare_speed(model: PreTrainedModel, args: MetaMorphTrainingArguments) -> None:
    """Apply `--text_loss`, `--recompute` and `--torch_compile` after `apply_stage`; weights and names do not change."""
    model.text_loss_options = TextLossOptions(args.text_loss)
    if args.recompute != "none":
        recompute_layers(model, selective=args.recompute == "selective")
    if args.torch_compile:
        compile_layers(model, backend=args.torch_compile_backend, mode=args.torch_compile_mode)


def recompute_layers(model: PreTrainedModel, *, selective: bool) -> None:
    """Keep less of each layer for the backward pass, and recompute the rest. A frozen tower keeps nothing anyway.

    `selective` keeps the results of matrix products and attention, which take the time, and recomputes what lies
    between them (norms, activations, rotations), which takes the memory. Otherwise only layer inputs are kept.
    """
    kwargs: dict[str, Any] = {"use_reentrant": False}
    if selective:
        kwargs["context_fn"] = partial(create_selective_checkpoint_contexts, list(_expensive_operators()))
    parts = [model.get_decoder()]
    if model.model.vision_tower.is_trained:
        parts.append(model.model.vision_tower.encoder)
    for part in parts:
        if hasattr(part, "activation_checkpointing_enable"):  # from Transformers 5.23 on the other name is deprecated
            part.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
        else:
            part.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
        if part is model.get_decoder():
            # Transformers makes the embeddings require a gradient, for reentrant recomputation. Ours does not need it,
            # and it would cause a backward pass through all of a frozen decoder.
            part.disable_input_require_grads()


def compile_layers(model: PreTrainedModel, *, backend: str | None = None, mode: str | None = None) -> None:
    """Compile every layer of the decoder and of the tower separately, in place; names of weights do not change.

    Layers of the same kind share one compilation, so it takes seconds instead of minutes. Embeddings, losses and the
    insertion of images, whose shapes change from batch to batch, are not compiled.
    """
    model.packed_kernel = None  # the lengths of samples would be constants of the code, compiled for every batch
    for part in (model.get_decoder(), model.model.vision_tower.encoder):
        for layer in part.modules():
            if isinstance(layer, GradientCheckpointingLayer):  # the layers that Transformers repeats
                layer.compile(backend=backend or "inductor", mode=mode)


def _expensive_operators() -> Iterator[Any]:
    """Operators whose results selective recomputation keeps."""
    aten = torch.ops.aten
    yield from (aten.mm.default, aten.addmm.default, aten.bmm.default)
    for name in ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu"):
        yield getattr(aten, f"_scaled_dot_product_{name}").default
    for name in ("_flash_attn_forward", "_flash_attn_varlen_forward"):  # of flash-attn, once that is imported
        if hasattr(torch.ops.flash_attn, name):
            yield getattr(torch.ops.flash_attn, name).default
