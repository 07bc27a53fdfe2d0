"""Estimates the memory that training takes on each GPU, from shapes alone.

`docs/multi_gpu.md` has the formulas; `tests/training/test_memory.py` compares the activations with what autograd keeps.
Not counted are temporary results inside single operations and the fragmentation of the allocator: leave a tenth of the
GPU free.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from metamorph.flags.checks import check_choice
from metamorph.models.text_head import MAX_LOGITS
from metamorph.training.arguments import MetaMorphTrainingArguments, RunArguments
from metamorph.training.arguments.training import RECOMPUTE
from metamorph.training.optimizer import VISION_TOWER, module_of


GIB = 2**30
ENGINES = ("single", "ddp", "fsdp2", "zero2", "zero3", "zero2_offload", "zero3_offload")
"""One process, or one of the engines of `--sharding`."""
LAYERS = ("trained", "frozen", "lora")
"""Training of the decoder's layers, which determines what they keep for the backward pass."""
LOGIT_BYTES = 12
"""Per logit: in the precision of the computation, in float32, its gradient, and the softmax."""
RUNTIME_BYTES = int(1.5 * GIB)
"""CUDA context, kernels, cuBLAS and NCCL buffers of a process with a GPU: an assumption."""
_FLOAT32, _HALF = 4, 2
_EIGHT_BITS = 2
"""Bytes per parameter of two moments in 8 bits."""
_BUCKETS = 400_000_000
"""Gradients in DeepSpeed's two buckets of `reduce_bucket_size`."""
_MAX_LIVE = 1_000_000_000
"""Weights that ZeRO-3 keeps gathered (`stage3_max_live_parameters`)."""


@dataclass(frozen=True)
class ModelSizes:
    """Numbers of parameters, as sharding engines distinguish them. See [`model_sizes`]."""

    trained: int
    frozen_bytes: int
    """Bytes of frozen parameters in memory, without a frozen tower."""
    frozen: int
    """The same as a number of parameters."""
    frozen_matrices: int
    """Those of them in linear layers of the decoder, which may be kept in fewer bits."""
    tower: int
    """A frozen vision tower: replicated, without gradients."""
    layer: int
    """The largest decoder layer, which is gathered at a time when weights are sharded."""
    root: int
    """Embedding table and head of the language model."""
    products: int
    """Trained matrices; autocast copies them and keeps the copies."""
    frozen_products: int
    """Frozen ones outside of a frozen tower: their copies live as long as the activations of their layer."""
    layers: str
    """One of `LAYERS`."""


@dataclass(frozen=True)
class MicroBatch:
    """The micro-batch of one process."""

    rows: int
    length: int
    """Tokens of a row, including padding."""
    images: float
    """Images in all rows."""
    supervised: int | None = None
    """Positions with a label; None counts all."""
    block_mask: bool = False
    """Whether a length × length mask separates samples of a row (packing with SDPA or eager attention)."""

    @property
    def tokens(self) -> int:
        """Positions of all rows."""
        return self.rows * self.length


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on each GPU, by purpose."""

    weights: int
    """This process's share; trained weights in float32."""
    compute_copies: int
    """Copies of weights in the precision of the computation, including gathered ones."""
    gradients: int
    """Including the buffers for averaging them."""
    optimizer: int
    activations: int
    """What the decoder, and a trained tower, keep for the backward pass."""
    logits: int
    """Logits of one chunk of supervised positions, and their gradient."""
    frozen_tower: int
    """Its weights, and its activations for the images of a micro-batch."""
    runtime: int
    """CUDA context and libraries."""
    host: int = 0
    """Main memory of each process for offloading; not part of the total."""

    @property
    def total(self) -> int:
        """Bytes on the GPU."""
        return sum(getattr(self, field.name) for field in fields(self) if field.name != "host")

    @property
    def state(self) -> int:
        """Bytes that do not depend on the batch: weights, gradients, optimizer."""
        return self.weights + self.gradients + self.optimizer


def model_sizes(model: PreTrainedModel) -> ModelSizes:
    """Count the parameters of a model after `apply_stage`, possibly on the meta device."""
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
        model: A MetaMorph model after `apply_stage`, possibly on the meta device.
        engine: One of `ENGINES`.
        batch: Micro-batch of one process.
        num_processes: GPUs of the run; with `--dp_replicate` those of one group.
        bf16: Whether the computation is in bfloat16 (or float16); otherwise it is in float32.
        recompute: One of `RECOMPUTE`.
        all_logits: Whether the logits of all supervised positions exist at once (`--text_loss full`).
        optimizer_bytes: Optimizer state of each trained parameter, see [`optimizer_bytes_of`].
        matrix_bytes: Bytes of each frozen weight in the decoder's linear layers, see [`matrix_bytes_of`].
        on_gpu: Whether to count the memory of CUDA itself.
        tower_on_gpu: Whether a frozen tower runs; otherwise it stays in main memory.

    Raises:
        ValueError: for an unknown `engine` or `recompute`.
    """
    check_choice("--sharding", engine, ENGINES)
    check_choice("--recompute", recompute, RECOMPUTE)
    sizes = model_sizes(model)
    if not tower_on_gpu:
        sizes = replace(sizes, tower=0)
    if matrix_bytes < _FLOAT32:  # then autocast has nothing to copy
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
    logits = (logits if all_logits else min(logits, MAX_LOGITS)) * (LOGIT_BYTES - (0 if bf16 else _HALF))
    moments: float = optimizer_bytes
    if optimizer_bytes == _EIGHT_BITS and sizes.trained:  # except for embeddings, see the trainer
        tables = {id(part.weight): part.weight for part in model.modules() if isinstance(part, nn.Embedding)}
        embeddings = sum(table.numel() for table in tables.values() if table.requires_grad)
        moments += (2 * _FLOAT32 - _EIGHT_BITS) * embeddings / sizes.trained
    state, host = _state(sizes, engine, num_processes, compute, moments, recompute, logits)
    return MemoryEstimate(
        **state,
        activations=int(
            decoder_activations(model.config.text_config, batch, compute, residual, recompute, sizes.layers)
            + _trained_tower_activations(model, batch.images, compute)
        ),
        logits=logits,
        frozen_tower=sizes.tower * compute + (_frozen_tower_work(model, batch.images, compute) if sizes.tower else 0),
        runtime=RUNTIME_BYTES if on_gpu else 0,
        host=host,
    )


def estimate_run(
    args: RunArguments, model: PreTrainedModel, engine: str, batch: MicroBatch, num_processes: int
) -> MemoryEstimate:
    """[`estimate_memory`] of a run with these flags."""
    return estimate_memory(
        model,
        engine,
        batch,
        num_processes=num_processes,
        bf16=args.compute_dtype.itemsize < _FLOAT32,
        recompute=recomputed(args.training),
        all_logits=args.training.text_loss == "full",
        optimizer_bytes=optimizer_bytes_of(args.training.optim),
        matrix_bytes=matrix_bytes_of(args),
        tower_on_gpu=args.encodes_images,
    )


def optimizer_bytes_of(optim: str) -> int:
    """Bytes of state per trained parameter of an optimizer of `--optim`; AdamW has 8."""
    name = str(optim).lower()
    if "8bit" in name:
        return _EIGHT_BITS
    if "adafactor" in name or "sgd" in name:
        return 0
    return 4 if "lion" in name or "rmsprop" in name else 8


def matrix_bytes_of(args: RunArguments) -> float:
    """Bytes of each frozen weight in the linear layers of the decoder on a GPU.

    In stage 1 and with LoRA, they are in the precision of the computation, see `store_frozen_matrices`. With `--bits 4`
    they are in 4 bits and a scale for 64 weights, which `--double_quant` quantises, too.
    """
    if args.model.bits == 4:
        return 0.5 + (1 / 64 + 4 / (64 * 256) if args.model.double_quant else 4 / 64)
    return args.compute_dtype.itemsize if args.model.stage == 1 or args.model.lora_enable else _FLOAT32


def recomputed(args: MetaMorphTrainingArguments) -> str:
    """The value of `--recompute`, taking Transformers' own flag into account."""
    theirs = args.gradient_checkpointing or getattr(args, "activation_checkpointing", False)  # from 5.23 on
    return "full" if theirs and args.recompute == "none" else args.recompute


def decoder_activations(
    config: PreTrainedConfig,
    batch: MicroBatch,
    compute: int,
    residual: int,
    recompute: str = "none",
    layers: str = "trained",
) -> int:
    """Bytes that the decoder keeps for the backward pass.

    For each token and layer of a Llama-like decoder (h hidden size, q and k widths of queries and of keys, f width of
    the MLP, c and r bytes of a number in the computation and in the residual stream):

        8·h                           inputs of the two norms, in float32
        + c·(2·q + 2·k) + 4·heads     queries, keys, values and output of the attention
        + 3·c·f + 8                   the gate before and after its activation, and the other factor
        + 2·r·h + c·f + (5·c·h if r > c else 2·c·h)    with trained weights: their inputs
        + (c + 1)·(5·h + q + f)       with LoRA instead: its inputs and dropout masks

    Args:
        config: Configuration of the language model.
        batch: Micro-batch of one process.
        compute: c.
        residual: r, larger than c only under autocast.
        recompute: `full` keeps the input of each layer, and everything of one layer at a time; `selective` also results
            of matrix products and attention: c·(2·q + 2·k + 2·h + 2·f) per token and layer.
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
    if autocast:  # which converts the mask in every layer
        layer, mask = layer + mask, 2 * mask
    count = config.num_hidden_layers
    inputs = batch.tokens * hidden * residual
    if recompute == "selective":
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        inputs += batch.tokens * compute * (2 * queries + 2 * kv_heads * head_dim + 2 * hidden + 2 * width)
    kept = count * layer if recompute == "none" else count * inputs + layer
    # Embeddings including visual tokens, and the final norm.
    ends = batch.tokens * hidden * (4 + (2 if layers == "trained" else 1) * residual)
    return int(kept + ends + mask)


def _state(
    sizes: ModelSizes, engine: str, processes: int, compute: int, optimizer_bytes: float, recompute: str, logits: int
) -> tuple[dict[str, int], int]:
    """Weights, copies, gradients and optimizer of one process, and its main memory for offloading."""
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
    # Two layers (the next one is prefetched) and the two tables are gathered at a time.
    live = 2 * sizes.layer + sizes.root
    gathered = compute * live
    if engine == "fsdp2":
        # Gradients to average; the first are those of `lm_head`, when the logits are gone.
        partial = max(compute * (sizes.layer + sizes.root) - logits, 0) if trained > live else 0
        sharded = {
            "weights": share * (_FLOAT32 * trained + sizes.frozen_bytes),
            "compute_copies": gathered,
            "gradients": share * _FLOAT32 * trained + partial,
            "optimizer": share * optimizer_bytes * trained,
        }
        return {name: int(value) for name, value in sharded.items()}, 0
    # DeepSpeed keeps the model in the precision of the computation, plus shards of float32 master weights.
    masters, moments = share * _FLOAT32 * trained, share * optimizer_bytes * trained
    whole = compute * (trained + sizes.frozen)
    gradients = share * _FLOAT32 * trained  # accumulated in float32
    host = 0.0
    live_weights = compute * min(max(live, _MAX_LIVE), trained + sizes.frozen)
    copies: float = whole if engine.startswith("zero2") else live_weights + share * whole
    buckets = compute * min(_BUCKETS, trained)
    if engine.endswith("offload"):
        host = masters + moments + share * _FLOAT32 * trained
        masters = moments = 0.0  # ZeRO-2 accumulates gradients on the GPU
        if engine.startswith("zero3"):
            host, copies, gradients = host + share * whole + gradients, live_weights, 0.0
    zero = {"weights": masters, "compute_copies": copies, "gradients": gradients + buckets, "optimizer": moments}
    return {name: int(value) for name, value in zero.items()}, int(host)


def _trained_tower_activations(model: PreTrainedModel, images: float, compute: int) -> float:
    """Activations of a trained vision tower: a transformer with layer norms, biases and a plain MLP."""
    if not model.model.vision_tower.is_trained:
        return 0
    config = model.config.vision_config
    patches, hidden = model.config.patch_grid**2, config.hidden_size
    # Two norms (float32 input and result, converted), four attention tensors and its output, three of the MLP.
    layer = patches * (hidden * (16 + 2 * compute + 5 * compute) + 3 * compute * _mlp_width(config))
    return images * config.num_hidden_layers * layer


def _frozen_tower_work(model: PreTrainedModel, images: float, compute: int) -> int:
    """Activations of one layer of a tower without gradients, and the pixels."""
    config: Any = model.config.vision_config
    patches, side = model.config.patch_grid**2, model.config.vision_image_size
    layer = patches * (6 * config.hidden_size + 2 * _mlp_width(config)) * compute
    return int(images * (layer + 3 * side * side * _FLOAT32))


def _mlp_width(config: PreTrainedConfig) -> int:
    """Width of the MLP; DINOv2 has a multiple of the hidden size."""
    width = getattr(config, "intermediate_size", None)
    return int(width or getattr(config, "mlp_ratio", 4) * config.hidden_size)


def _is_table(name: str) -> bool:
    return "embed" in name or name.endswith(".new_rows")


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
