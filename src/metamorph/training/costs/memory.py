"""How much memory a training run will need on each GPU, from shapes alone.

An estimate with its terms named, so that what does not fit is known before weights are loaded. `docs/multi_gpu.md` has
the formulas; the term for activations is compared with what autograd keeps in `tests/training/test_memory.py`. Not
counted are temporary results inside single operations and the fragmentation of the allocator: leave a tenth of the
GPU free.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from metamorph.flags.checks import check_choice
from metamorph.models.text_head import MAX_LOGITS
from metamorph.training.arguments.training import RECOMPUTE
from metamorph.training.optimizer import VISION_TOWER, module_of


GIB = 2**30
ENGINES = ("single", "ddp", "fsdp2", "zero2", "zero3", "zero2_offload", "zero3_offload")
"""What `estimate_memory` knows: one process, or one of the engines of `--sharding`."""
LAYERS = ("trained", "frozen", "lora")
"""What happens to the decoder's layers: it decides what they keep for the backward pass."""
LOGIT_BYTES = 12
"""For one logit: in the precision of the computation, in float32, its gradient, and the softmax."""
RUNTIME_BYTES = int(1.5 * GIB)
"""CUDA context, kernels, cuBLAS and NCCL buffers of a process with a GPU: an assumption."""
_FLOAT32, _HALF = 4, 2
_EIGHT_BITS = 2
"""Bytes of the two moments of a parameter in 8 bits."""
_BUCKETS = 400_000_000
"""Gradients in DeepSpeed's two buckets, of `reduce_bucket_size` each."""
_MAX_LIVE = 1_000_000_000
"""Weights that ZeRO-3 keeps gathered (`stage3_max_live_parameters`)."""


@dataclass(frozen=True)
class ModelSizes:
    """Numbers of parameters, as a sharding engine distinguishes them. See [`model_sizes`]."""

    trained: int
    """Trained parameters of all modules."""
    frozen_bytes: int
    """Bytes of frozen parameters outside of a frozen tower, as they are kept in memory."""
    frozen: int
    """The same as a number of parameters."""
    frozen_matrices: int
    """Those of them that belong to linear layers of the decoder, which can be kept in fewer bits."""
    tower: int
    """Parameters of a frozen vision tower: replicated, without gradients."""
    layer: int
    """Parameters of the largest decoder layer: what is gathered at a time when weights are sharded."""
    root: int
    """Parameters of embedding table and head of the language model."""
    products: int
    """Trained weights that matrices are multiplied by; autocast copies them and keeps the copies."""
    frozen_products: int
    """Frozen ones outside of a frozen tower: their copies live as long as the activations of their layer."""
    layers: str
    """One of `LAYERS`."""


@dataclass(frozen=True)
class MicroBatch:
    """What one process computes at a time."""

    rows: int
    """Rows (`per_device_train_batch_size`)."""
    length: int
    """Tokens of a row, padding included."""
    images: float
    """Images in all rows."""
    supervised: int | None = None
    """Positions with a label; None counts all."""
    block_mask: bool = False
    """Whether samples of a row are kept apart by a mask of length × length (packing with SDPA or eager attention)."""

    @property
    def tokens(self) -> int:
        """Positions of all rows."""
        return self.rows * self.length


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on each GPU by what they are for."""

    weights: int
    """Weights (float32 masters where they are trained), or this process's share of them."""
    compute_copies: int
    """Copies of weights in the precision of the computation, gathered ones included."""
    gradients: int
    """Gradients and the buffers they are averaged in."""
    optimizer: int
    """State of the optimizer."""
    activations: int
    """What the decoder, and a trained tower, keep for the backward pass."""
    logits: int
    """Logits of one chunk of supervised positions, and their gradient."""
    frozen_tower: int
    """Weights of the frozen tower, and what it needs for the images of a micro-batch."""
    runtime: int
    """CUDA context and libraries."""
    host: int = 0
    """Main memory of each process that offloading takes; not part of the total."""

    @property
    def total(self) -> int:
        """Bytes on the GPU."""
        return sum(getattr(self, field.name) for field in fields(self) if field.name != "host")

    @property
    def state(self) -> int:
        """Bytes that are there all the time, whatever the batch: weights, gradients, optimizer."""
        return self.weights + self.gradients + self.optimizer


def model_sizes(model: PreTrainedModel) -> ModelSizes:
    """Count the parameters of a model after `apply_stage`.

    Args:
        model: A MetaMorph model, possibly on the meta device.
    """
    trained = frozen = frozen_bytes = tower = 0
    decoder = model.get_decoder()
    products = {True: 0, False: 0}
    for name, parameter in model.named_parameters():
        count = parameter.numel()
        if parameter.requires_grad:
            trained += count
        elif module_of(name) == VISION_TOWER:
            tower += count
            continue
        else:
            frozen += count
            frozen_bytes += count * parameter.element_size()
        if parameter.ndim > 1 and not _is_table(name):
            products[parameter.requires_grad] += count
    matrices = [module.weight for module in decoder.modules() if isinstance(module, nn.Linear)]
    lora = any(".lora_" in name for name, _ in decoder.named_parameters())
    layers = [_count(layer) for part in decoder.modules() if isinstance(part, nn.ModuleList) for layer in part]
    tables = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
    return ModelSizes(
        trained=trained,
        frozen_bytes=frozen_bytes,
        frozen=frozen,
        frozen_matrices=sum(weight.numel() for weight in matrices if not weight.requires_grad),
        tower=tower,
        layer=max(layers, default=_count(decoder)),
        root=sum(table.numel() for table in tables),
        products=products[True],
        frozen_products=products[False],
        layers="lora" if lora else "trained" if any(weight.requires_grad for weight in matrices) else "frozen",
    )


def estimate_memory(
    model: PreTrainedModel,
    engine: str,
    batch: MicroBatch,
    *,
    num_processes: int = 1,
    bf16: bool = True,
    recompute: str = "none",
    all_logits: bool = False,
    optimizer_bytes: int = 8,
    matrix_bytes: float = _FLOAT32,
    on_gpu: bool = True,
    tower_on_gpu: bool = True,
) -> MemoryEstimate:
    """Estimate the memory that training takes on each GPU.

    Args:
        model: A MetaMorph model after `apply_stage`; the meta device suffices.
        engine: One of `ENGINES`.
        batch: Micro-batch of one process.
        num_processes: GPUs of the run.
        bf16: Whether bfloat16 (or float16) computes; else float32.
        recompute: How much of each decoder layer is computed again in the backward pass, one of `RECOMPUTE`.
        all_logits: Whether the logits of all supervised positions exist at once (`--text_loss full`).
        optimizer_bytes: State of the optimizer for each trained parameter; AdamW has 8, see [`optimizer_bytes_of`].
        matrix_bytes: Bytes of each frozen weight of the decoder's linear layers, see [`matrix_bytes_of`].
        on_gpu: Whether to count CUDA's own memory.
        tower_on_gpu: Whether a frozen tower computes; else it stays in main memory.

    Raises:
        ValueError: for an unknown engine or kind of checkpointing.
    """
    check_choice("--sharding", engine, ENGINES)
    check_choice("--recompute", recompute, RECOMPUTE)
    sizes = model_sizes(model)
    if not tower_on_gpu:
        sizes = replace(sizes, tower=0)
    if matrix_bytes < _FLOAT32:  # and then autocast has nothing to copy
        fewer = sizes.frozen_matrices
        sizes = replace(
            sizes,
            frozen_bytes=int(sizes.frozen_bytes - (_FLOAT32 - matrix_bytes) * fewer),
            frozen_products=sizes.frozen_products - fewer,
        )
    compute = _HALF if bf16 else _FLOAT32
    # Only autocast keeps the residual stream in float32; sharding engines cast the inputs of the model.
    residual = _FLOAT32 if engine in ("single", "ddp") else compute
    logits = (batch.supervised or batch.tokens) * model.config.text_config.vocab_size
    moments: float = optimizer_bytes
    if optimizer_bytes == _EIGHT_BITS and sizes.trained:  # the state of embeddings has 32 bits, see the trainer
        tables = {id(part.weight): part.weight for part in model.modules() if isinstance(part, nn.Embedding)}
        embeddings = sum(table.numel() for table in tables.values() if table.requires_grad)
        moments += (2 * _FLOAT32 - _EIGHT_BITS) * embeddings / sizes.trained
    state, host = _state(sizes, engine, num_processes, compute, moments, recompute)
    return MemoryEstimate(
        **state,
        activations=int(
            decoder_activations(model.config.text_config, batch, compute, residual, recompute, sizes.layers)
            + _trained_tower_activations(model, batch.images, compute)
        ),
        logits=(logits if all_logits else min(logits, MAX_LOGITS)) * (LOGIT_BYTES - (0 if bf16 else _HALF)),
        frozen_tower=sizes.tower * compute + (_frozen_tower_work(model, batch.images, compute) if sizes.tower else 0),
        runtime=RUNTIME_BYTES if on_gpu else 0,
        host=host,
    )


def optimizer_bytes_of(optim: str) -> int:
    """Bytes of state for each trained parameter of an optimizer of `--optim`."""
    name = str(optim).lower()
    if "8bit" in name:
        return _EIGHT_BITS
    if "adafactor" in name or "sgd" in name:
        return 0
    return 4 if "lion" in name or "rmsprop" in name else 8


def matrix_bytes_of(bits: int, *, lora: bool, double_quant: bool = True, compute: int = _HALF) -> float:
    """Bytes of each frozen weight in the linear layers of the decoder on a GPU.

    Args:
        bits: 4 or 16 (`--bits`).
        lora: Whether LoRA is trained beside them; they are then kept in the precision of the computation.
        double_quant: Whether the scales of 4-bit weights, one for 64 of them, are quantised themselves.
        compute: Bytes of a number in the computation.
    """
    if bits == 4:
        return 0.5 + (1 / 64 + 4 / (64 * 256) if double_quant else 4 / 64)
    return compute if lora else _FLOAT32


def decoder_activations(
    config: PreTrainedConfig,
    batch: MicroBatch,
    compute: int,
    residual: int,
    recompute: str = "none",
    layers: str = "trained",
) -> int:
    """Bytes that the decoder keeps for the backward pass.

    Of each token and layer of a Llama-like decoder (h hidden size, q and k widths of queries and of keys, f width of
    the MLP, c and r bytes of a number in the computation and in the residual stream):

        8·h                           inputs of the two norms, in float32
        + c·(2·q + 2·k) + 4·heads     queries, keys, values and output of the attention
        + 3·c·f + 8                   the gate before and after its activation function, and what it is multiplied by
        + 2·r·h + c·f + (5·c·h if r > c else 2·c·h)    where weights are trained: what they are multiplied by
        + (c + 1)·(5·h + q + f)       with LoRA instead: its own inputs and the mask of its dropout

    Args:
        config: Configuration of the language model.
        batch: Micro-batch of one process.
        compute: Bytes of a number in the computation.
        residual: Bytes of a number in the residual stream; more than `compute` only under autocast.
        recompute: `full` keeps the input of each layer, and all of one layer at a time; `selective` also results of
            matrix products and of attention: c·(2·q + 2·k + 2·h + 2·f) for each token and layer.
        layers: One of `LAYERS`.
    """
    hidden, heads, width = config.hidden_size, config.num_attention_heads, _mlp_width(config)
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    queries = heads * head_dim
    # A mask makes SDPA repeat keys and values for the queries that share them.
    shared = heads if batch.block_mask else getattr(config, "num_key_value_heads", None) or heads
    autocast = residual > compute
    token = 8 * hidden + compute * (2 * queries + 2 * shared * head_dim) + 4 * heads + 3 * compute * width + 8
    if layers == "trained":
        token += 2 * residual * hidden + compute * width + compute * hidden * (5 if autocast else 2)
    elif layers == "lora":
        token += (compute + 1) * (5 * hidden + queries + width)
    layer = batch.tokens * token
    mask = compute * batch.tokens * batch.length if batch.block_mask else 0
    if autocast:  # converts the mask in every layer
        layer, mask = layer + mask, 2 * mask
    count = config.num_hidden_layers
    inputs = batch.tokens * hidden * residual
    if recompute == "selective":
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        inputs += batch.tokens * compute * (2 * queries + 2 * kv_heads * head_dim + 2 * hidden + 2 * width)
    kept = count * layer if recompute == "none" else count * inputs + layer
    # Embeddings with visual tokens in them, and the final norm.
    ends = batch.tokens * hidden * (4 + (2 if layers == "trained" else 1) * residual)
    return int(kept + ends + mask)


def _state(
    sizes: ModelSizes, engine: str, processes: int, compute: int, optimizer_bytes: float, recompute: str
) -> tuple[dict[str, int], int]:
    """Weights, copies, gradients and optimizer of one process, and what is offloaded to main memory."""
    trained, share = sizes.trained, 1 / processes
    if engine in ("single", "ddp"):
        buckets = _FLOAT32 * trained if processes > 1 else 0
        copied = sizes.products + (sizes.frozen_products if recompute == "none" else sizes.layer)
        state = {
            "weights": _FLOAT32 * trained + sizes.frozen_bytes,
            "compute_copies": compute * copied if compute < _FLOAT32 else 0,
            "gradients": _FLOAT32 * trained + buckets,
            "optimizer": round(optimizer_bytes * trained),
        }
        return state, 0
    # Weights of two layers (the next one is fetched early) and of the two tables are whole at a time.
    live = 2 * sizes.layer + sizes.root
    gathered = compute * live
    if engine == "fsdp2":
        partial = compute * (sizes.layer + sizes.root) if trained > live else 0
        sharded = {
            "weights": share * (_FLOAT32 * trained + sizes.frozen_bytes),
            "compute_copies": gathered,
            "gradients": share * _FLOAT32 * trained + partial,
            "optimizer": share * optimizer_bytes * trained,
        }
        return {name: int(value) for name, value in sharded.items()}, 0
    # DeepSpeed keeps the model in the precision of the computation, and shards of float32 masters beside it.
    masters, moments = share * _FLOAT32 * trained, share * optimizer_bytes * trained
    whole = compute * (trained + sizes.frozen)
    gradients = share * compute * trained
    host = 0.0
    live_weights = compute * min(max(live, _MAX_LIVE), trained + sizes.frozen)
    copies: float = whole if engine.startswith("zero2") else live_weights + share * whole
    buckets = compute * min(_BUCKETS, trained)
    if engine.endswith("offload"):
        host = masters + moments + share * _FLOAT32 * trained
        masters = moments = gradients = 0.0
        if engine.startswith("zero3"):
            host, copies = host + share * whole, live_weights
    zero = {"weights": masters, "compute_copies": copies, "gradients": gradients + buckets, "optimizer": moments}
    return {name: int(value) for name, value in zero.items()}, int(host)


def _trained_tower_activations(model: PreTrainedModel, images: float, compute: int) -> float:
    """Of a vision tower that is trained: a transformer with layer norms, biases and a plain MLP."""
    if not model.model.vision_tower.is_trained:
        return 0
    config = model.config.vision_config
    patches, hidden = model.config.patch_grid**2, config.hidden_size
    # Two norms (float32 input and result, converted), four attention tensors and its output, three of the MLP.
    layer = patches * (hidden * (16 + 2 * compute + 5 * compute) + 3 * compute * _mlp_width(config))
    return images * config.num_hidden_layers * layer


def _frozen_tower_work(model: PreTrainedModel, images: float, compute: int) -> int:
    """One layer's results of a tower without gradients, and the pixels."""
    config: Any = model.config.vision_config
    patches, side = model.config.patch_grid**2, model.config.vision_image_size
    layer = patches * (6 * config.hidden_size + 2 * _mlp_width(config)) * compute
    return int(images * (layer + 3 * side * side * _FLOAT32))


def _mlp_width(config: PreTrainedConfig) -> int:
    """Width of the MLP; DINOv2 gives it as a multiple of the hidden size."""
    width = getattr(config, "intermediate_size", None)
    return int(width or getattr(config, "mlp_ratio", 4) * config.hidden_size)


def _is_table(name: str) -> bool:
    return "embed" in name or name.endswith(".new_rows")


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
