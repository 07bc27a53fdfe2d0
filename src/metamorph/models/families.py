"""What families of language models compute outside of their decoder, and a check that the composite does the same.

Some scales, caps and losses are in Transformers' `…ForCausalLM` classes and not in the decoder that the composite is
built on, and some decoders need more than embeddings. A difference would show up only as a model that learns badly. So
the first time a family is used, a small random copy of it is composed and compared with itself.
"""

import copy
import json
import logging
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel

from metamorph.files.model_files import BUILD_ERRORS


logger = logging.getLogger(__name__)

Compose = Callable[[PreTrainedModel], PreTrainedModel]
"""Composes a MetaMorph model from a language model, whose modules it takes over."""

_LAYERS, _HEADS, _INTERMEDIATE, _VOCABULARY = 2, 4, 32, 512
_MOST_WEIGHTS = 2**26  # most weights of a copy: 256 MiB
_DIVIDED = (
    "hidden_size",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "mamba_d_ssm",
    "mamba_n_heads",
    "mamba_num_heads",
    "num_attention_heads",
    "num_key_value_heads",
    "word_embed_proj_dim",
)
"""Sizes divided by the same number, which keeps the size of a head and what depends on it."""
_SAME_FAMILY = re.compile(r"vocab_size|_token_id|dtype|_name_or_path|architectures|transformers_version|quantization")
"""Fields that may differ within a family: between the configuration a run starts from, and that of its model."""
_SUPPORT: dict[str, "FamilySupport"] = {}  # results of this process
_TOLERANCE = 1e-3  # relative to the largest logit: equal computations differ by rounding only


def embedding_scale(config: PreTrainedConfig) -> float:
    """Factor that a decoder applies to embeddings it looks up itself, but not to `inputs_embeds`."""
    return config.embedding_multiplier if config.model_type == "falcon_h1" else 1.0


def modifies_logits(config: PreTrainedConfig) -> bool:
    """Whether [`scale_and_cap_logits`] changes anything."""
    return _logit_scale(config) != 1.0 or getattr(config, "final_logit_softcapping", None) is not None


def scale_and_cap_logits(config: PreTrainedConfig, logits: Tensor) -> Tensor:
    """Scale (Cohere, Granite, …) and cap (Gemma) the [..., V] logits of `lm_head` as the family does."""
    scale, cap = _logit_scale(config), getattr(config, "final_logit_softcapping", None)
    if scale != 1.0:
        logits = logits * scale
    return logits if cap is None else torch.tanh(logits / cap) * cap


def router_loss_coefficient(config: PreTrainedConfig) -> float:
    """Weight of the load-balancing loss of a mixture of experts; 0 without one."""
    return getattr(config, "router_aux_loss_coef", None) or getattr(config, "aux_loss_coef", None) or 0.0


def router_loss(decoder: PreTrainedModel, router_logits: tuple[Tensor, ...]) -> Tensor | None:
    """The load-balancing loss of a mixture of experts, by the family's own function; None if it has none.

    `router_logits` are [tokens, experts] of each layer with experts.
    """
    function = getattr(sys.modules[type(decoder).__module__], "load_balancing_loss_func", None)
    if function is None or not router_logits:
        return None
    return function(router_logits, router_logits[0].shape[-1], decoder.config.num_experts_per_tok)


@dataclass(frozen=True)
class FamilySupport:
    """What a small copy of a language model has shown."""

    is_known: bool
    """Whether a small copy could be built and compared. If not, only the weights can tell."""
    unused: frozenset[str] = frozenset()
    """Weights of the decoder that never have a gradient, such as biases that select experts; `*` is any layer."""

    def uses(self, name: str) -> bool:
        """Whether a weight, named as in `named_parameters()` of the decoder, has a gradient in training."""
        return _any_layer(name) not in self.unused


def check_language_model(config: PreTrainedConfig, compose: Compose) -> FamilySupport:
    """Compare a small random copy of a language model with a composite made of it, see [`compose_and_compare`].

    No weights are needed. Two layers, few heads and a small vocabulary take about a second, whatever the size of the
    model, and once per process. The state of random generators is preserved.
    """
    mapped = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if mapped is not None and mapped.config_class is config.sub_configs.get("text_config"):
        config = config.get_text_config()  # as `AutoModelForCausalLM.from_pretrained` does
    if mapped is None or config.get_text_config() is not config:
        raise _refusal(config, "it is not a decoder-only language model, but one of several parts or of another kind")
    fields = {name: value for name, value in config.to_dict().items() if not _SAME_FAMILY.search(name)}
    key = json.dumps(fields, sort_keys=True, default=str)
    if key not in _SUPPORT:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(0)  # `torch.manual_seed` would seed GPUs too
            language_model = _small_copy(mapped, config)
            if language_model is None:
                _SUPPORT[key] = FamilySupport(is_known=False)
            else:
                _SUPPORT[key] = FamilySupport(True, _without_gradient(compose_and_compare(language_model, compose)))
    return _SUPPORT[key]


def compose_and_compare(language_model: PreTrainedModel, compose: Compose) -> PreTrainedModel:
    """Compose a model, and compare its logits on text and load-balancing losses with those of the language model.

    It must not fail either, as decoders do that need token ids, and no position may depend on later ones.
    """
    was_training = language_model.training
    size, device = language_model.get_output_embeddings().weight.shape[0], language_model.device
    ids = (torch.arange(1, 10, device=device) * 7919 % size)[None]
    with torch.no_grad():
        try:
            model = compose(language_model).eval()
            ids = torch.where(ids == model.config.image_token_id, 0, ids)
            decoder = model.get_decoder()
            language_model.eval()
            own = language_model(input_ids=ids, use_cache=False).logits
            router_losses = _router_losses(language_model, decoder, ids)
            ours = model(input_ids=ids, use_cache=False).logits
            _try_an_image(model, ids)
            changed = model(input_ids=torch.cat([ids[:, :-1], ids[:, :1]], dim=1), use_cache=False).logits
        except BUILD_ERRORS as error:
            what, *_ = [*str(error).splitlines(), ""]
            raise _refusal(language_model.config, f"the composite fails: {type(error).__name__}: {what}") from error
        _compare(language_model.config, "logits", ours, own)
        _compare(language_model.config, "logits of a token whose successors change", changed[:, :-1], ours[:, :-1])
        if router_losses is not None:
            _compare(language_model.config, "auxiliary losses of the experts", *router_losses)
    return model.train(was_training)


def _logit_scale(config: PreTrainedConfig) -> float:
    scale = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0
    divisor = getattr(config, "logits_scaling", None) or 1.0
    return scale * divisor if config.model_type == "hyperclovax" else scale / divisor


def _router_losses(
    language_model: PreTrainedModel, decoder: PreTrainedModel, ids: Tensor
) -> tuple[Tensor, Tensor] | None:
    """Our load-balancing loss and the language model's; None if it adds none, or has no experts."""
    names = ("router_aux_loss_coef", "aux_loss_coef")
    if not any(getattr(language_model, name, None) for name in names):
        return None
    kwargs = {"input_ids": ids, "use_cache": False, "output_router_logits": True}
    router_logits = decoder(**kwargs).router_logits
    if not router_logits:
        return None
    ours, own = router_loss(decoder, router_logits), language_model(**kwargs).aux_loss
    return torch.as_tensor(0.0 if ours is None else ours), torch.as_tensor(own)


def _try_an_image(model: PreTrainedModel, ids: Tensor) -> None:
    """Run visual tokens between text: some decoders look up the ids of embeddings, and fail."""
    config, embeds = model.config, model.get_input_embeddings()(ids[:, : model.config.num_image_tokens])
    count = config.num_image_tokens
    row = torch.cat([ids, torch.full_like(ids[:, :1], config.image_token_id).expand(1, count)], dim=1)
    visual_tokens = embeds.new_full((1, count, config.vision_feature_size), 0.5)
    model(input_ids=row, visual_tokens=visual_tokens, use_cache=False)


def _without_gradient(model: PreTrainedModel) -> frozenset[str]:
    """Names of the decoder's weights that no output depends on differentiably, without layer numbers."""
    decoder, table = model.get_decoder().train().requires_grad_(True), model.get_input_embeddings()
    try:
        with torch.enable_grad():
            outputs = decoder(inputs_embeds=table(torch.arange(_LAYERS * 8)[None]), use_cache=False)
            outputs.last_hidden_state.square().sum().backward()
    except BUILD_ERRORS as error:  # some kernels have no backward pass on a CPU
        logger.debug("no backward pass of %s: %s", type(decoder).__name__, error)
        return frozenset()
    weights = {name: weight.grad is not None for name, weight in decoder.named_parameters()}
    used = {_any_layer(name) for name, has_gradient in weights.items() if has_gradient}
    return frozenset({*map(_any_layer, weights)} - used)


def _any_layer(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)


def _compare(config: PreTrainedConfig, what: str, ours: Tensor, own: Tensor) -> None:
    if ours.shape != own.shape:
        raise _refusal(config, f"its {what} have the shape {tuple(own.shape)}, the composite's {tuple(ours.shape)}")
    difference, largest = (ours - own).abs().max().item(), own.abs().max().item()
    if not difference <= _TOLERANCE * largest:  # NaN is not equal
        raise _refusal(config, f"its {what} differ by {difference:.3g} (they are up to {largest:.3g})")


def _refusal(config: PreTrainedConfig, reason: str) -> ValueError:
    return ValueError(
        f"language models of type {config.model_type} cannot be used: compared with AutoModelForCausalLM's, {reason}; "
        "use another language model (docs/model.md, 'Which towers and language models')"
    )


@torch.no_grad()
def _small_copy(cls: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel | None:
    """A language model of the family with few small layers and random weights; None if none can be built."""
    for heads in (_HEADS, None):
        try:
            small = _shrunk(config, heads)
            with torch.device("meta"):
                count = sum(parameter.numel() for parameter in cls(small).parameters())
            if count > _MOST_WEIGHTS:
                continue
            model = cls(small).float().eval()
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)  # so that none is exactly 0 or 1
            model(input_ids=torch.arange(_LAYERS)[None], use_cache=False)
        except BUILD_ERRORS as error:
            logger.debug("no small %s with %s heads: %s", config.model_type, heads, error)
        else:
            return model
    return None


def _shrunk(config: PreTrainedConfig, heads: int | None) -> PreTrainedConfig:
    """The configuration with two layers, one of each kind, and a few heads (or all) of the same size."""
    small = copy.deepcopy(config)
    small.dtype = None
    if hasattr(small, "quantization_config"):
        del small.quantization_config
    count, kinds = config.num_hidden_layers, getattr(config, "layer_types", None) or ["", ""]
    other = next((index for index, kind in enumerate(kinds) if kind != kinds[0]), 1)
    factor = 1
    if heads is not None:
        # A divisor of all sizes, if there is one: otherwise quotients are rounded down.
        count_all = config.num_attention_heads
        divisor = next((number for number in range(heads, count_all) if _divides(number, config)), count_all)
        factor = count_all / (divisor if divisor <= 4 * heads else heads)
    for name, value in config.to_dict().items():
        if isinstance(value, (list, tuple)) and len(value) == count:
            setattr(small, name, [value[0], value[other]])
        elif name.endswith("_token_id"):
            setattr(small, name, 0 if isinstance(value, list) or (value or 0) >= _VOCABULARY else value)
        elif not isinstance(value, int):
            continue
        elif "vocab_size" in name:
            setattr(small, name, min(value, _VOCABULARY))
        elif "intermediate_size" in name:
            setattr(small, name, min(value, _INTERMEDIATE))
    for name in _DIVIDED:
        if isinstance(value := getattr(config, name, None), int):
            setattr(small, name, max(1, int(value / factor)))
    small.num_hidden_layers = _LAYERS
    return small


def _divides(number: int, config: PreTrainedConfig) -> bool:
    return config.num_attention_heads % number == 0 and config.hidden_size % (config.num_attention_heads // number) == 0
