"""The composite model: the backbone reads images and text, two heads predict both, and their losses are summed.

Shape legend: B batch, S sequence, H hidden size of the language model, V vocabulary, I images in the batch,
N visual tokens per image, D features of one visual token.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import can_return_tuple

from metamorph.models.sequence.image_tokens import add_image_tokens
from metamorph.runs.checkpoint_files import check_is_plain

from .adapters import find_adapter_folder, load_adapter_folder
from .backbone import MetaMorphModel, MetaMorphPreTrainedModel
from .batch_indices import BatchIndices, index_batch
from .configuration_metamorph import MetaMorphConfig
from .embeddings import NewTokenEmbedding, add_token_rows
from .families import (
    FamilySupport,
    check_language_model,
    compose_and_compare,
    modifies_logits,
    router_loss,
    router_loss_coefficient,
    scale_and_cap_logits,
)
from .generation import MetaMorphGenerationMixin
from .losses import LossNormalizers, LossSum, average, cosine_sum, direction_sums, text_loss, visual_loss
from .outputs import MetaMorphOutput
from .packed_attention import PackedKernel, mask_of_samples
from .projectors import build_mm_projector, build_vision_head
from .text_head import TextHead, TextLossOptions
from .vision_tower import VisionTower, normalize_visual_tokens


class MetaMorphForConditionalGeneration(MetaMorphPreTrainedModel, MetaMorphGenerationMixin):
    """A language model that reads and writes images as visual tokens (VPiT, arXiv 2412.14164).

    Parts: `model.vision_tower`, `model.mm_projector` (connector), `model.language_model` (decoder), `lm_head` and
    `vision_head`. Compose one from pretrained parts with [`from_parts`]; load a finished one with `from_pretrained`.
    """

    text_loss_options = TextLossOptions()
    """How the text loss is computed. Not part of the configuration: the result is the same."""
    packed_kernel: PackedKernel | None = "sdpa"
    """What computes packed rows; None leaves their masks to Transformers. Not part of the configuration either."""
    accepts_loss_kwargs = True
    """Tells `transformers.Trainer` that `forward` takes `num_items_in_batch`."""

    def __init__(self, config: MetaMorphConfig):
        super().__init__(config)
        self.model = MetaMorphModel(config)
        text = config.text_config
        self.lm_head: nn.Module = TextHead(text.hidden_size, text.vocab_size, bias=config.lm_head_bias)
        self.vision_head = build_vision_head(config)
        self._declare_tied_weights()
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a model as in Transformers, or an adapter folder: its base with the adapter merged into it.

        For adapter folders also takes `dequantize`, see [`load_adapter_folder`], and `base`, an `AdapterBase` to use
        instead of the one that the folder names, if that has moved.
        """
        check_is_plain(pretrained_model_name_or_path)
        folder = find_adapter_folder(pretrained_model_name_or_path, kwargs)
        if folder is not None:
            return load_adapter_folder(cls, folder, **kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @classmethod
    def from_parts(
        cls,
        language_model: PreTrainedModel,
        vision_encoder: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        **config_overrides: Any,
    ) -> "MetaMorphForConditionalGeneration":
        """Compose a model from a pretrained language model and a pretrained vision encoder.

        The image tokens are added to `tokenizer` (in place) if it lacks them; their embedding rows start at the mean of
        the existing rows. Connector and vision head get PyTorch's default initialisation. The parts are not copied: do
        not use `language_model` and `vision_encoder` on their own afterwards.

        Args:
            language_model: a decoder of `AutoModelForCausalLM` whose family is supported.
            vision_encoder: a loaded vision model, see [`load_vision_encoder`].
            tokenizer: the language model's tokenizer.
            **config_overrides: fields of [`MetaMorphConfig`], such as `num_image_tokens=64`.
        """
        support = cls.check_language_model(language_model.config)
        config = MetaMorphConfig(
            text_config=language_model.config, vision_config=vision_encoder.config, **config_overrides
        )
        tokens = add_image_tokens(
            tokenizer,
            mm_use_im_start_end=config.mm_use_im_start_end,
            mm_use_im_patch_token=config.mm_use_im_patch_token,
        )
        config.image_token_id = tokens.image
        config.image_start_token_id, config.image_end_token_id = tokens.image_start, tokens.image_end
        new_ids = [tokenizer.convert_tokens_to_ids(token) for token in tokens.new]
        add_token_rows(language_model, len(tokenizer), new_ids)
        compose = partial(cls._compose, config, vision_encoder)
        if support.is_known or language_model.device.type == "meta":
            return compose(language_model)
        return compose_and_compare(language_model, compose)

    @classmethod
    def check_language_model(cls, config: PreTrainedConfig) -> FamilySupport:
        """Check, without weights, that a composite computes what the family does; a `ValueError` says what differs."""
        return check_language_model(config, cls._compose_probe)

    @classmethod
    def _compose_probe(cls, language_model: PreTrainedModel) -> "MetaMorphForConditionalGeneration":
        """A composite with a minimal tower; the last token is the placeholder."""
        vision = SiglipVisionConfig(
            hidden_size=2, intermediate_size=2, num_hidden_layers=1, num_attention_heads=1, image_size=2, patch_size=2
        )
        placeholder = language_model.get_input_embeddings().weight.shape[0] - 1
        config = MetaMorphConfig(
            text_config=language_model.config, vision_config=vision, num_image_tokens=1, image_token_id=placeholder
        )
        return cls._compose(config, SiglipVisionModel(vision), language_model)

    @classmethod
    def _compose(
        cls, config: MetaMorphConfig, vision_encoder: PreTrainedModel, language_model: PreTrainedModel
    ) -> "MetaMorphForConditionalGeneration":
        """Compose two parts; `config` has the ids of the image tokens, and the tables have their rows."""
        config.text_config = language_model.config
        head = language_model.get_output_embeddings()
        config.lm_head_bias = head.bias is not None
        with torch.device("meta"):  # all parts are replaced below
            model = cls(config)
        dtype, device = language_model.dtype, language_model.device
        decoder_class = type(model.get_decoder())  # what `AutoModel` builds when the finished model is loaded
        decoder = next((part for part in language_model.modules() if type(part) is decoder_class), None)
        if decoder is None:
            raise ValueError(f"{type(language_model).__name__} has no part of the type {decoder_class.__name__}")
        model.model.language_model = decoder
        model.model.vision_tower = VisionTower(config, vision_encoder).to(device, vision_encoder.dtype)
        model.model.mm_projector = build_mm_projector(config).to(device, dtype)
        model.lm_head = TextHead.from_linear(head)
        model.vision_head = build_vision_head(config).to(device, dtype)
        model._declare_tied_weights()
        model.tie_weights()
        model.generation_config = language_model.generation_config
        return model

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the head of the language model."""
        self.lm_head = TextHead.from_linear(value)

    def get_visual_tokens(self, pixel_values: Tensor) -> Tensor:
        """Encode images once, to be passed as `visual_tokens` later: [I, 3, H, W] -> [I, N, D]."""
        return self.model.vision_tower(pixel_values)

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """See [`MetaMorphModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        visual_tokens: Tensor | None = None,
        visual_tokens_index: Tensor | None = None,
        labels: Tensor | None = None,
        visual_target_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor | None = None,
        loss_normalizers: LossNormalizers | None = None,
        num_items_in_batch: Tensor | int | None = None,
        generated_visual_tokens: Tensor | None = None,
        predict_visual_token: bool = False,
        indices: BatchIndices | None = None,
        **kwargs: Any,
    ) -> MetaMorphOutput:
        """One pass over a batch, with losses if `labels` are given.

        Args:
            input_ids: [B, S] with `N` placeholders for each image.
            attention_mask: [B, S], 0 where padded. None in packed rows, and with `indices` of our collators.
            position_ids: [B, S]. In packed rows they restart at each sample: without an attention mask and a cache,
                Transformers keeps the samples apart (`metamorph.data.batching.collation.PackedCollator`).
            pixel_values: [I, 3, height, width] the images of the batch in reading order. None in a text-only batch.
            visual_tokens: [I, N, D] encoded or generated images, instead of `pixel_values`.
            visual_tokens_index: their positions among all images, if there are `pixel_values` too.
            labels: [B, S], not shifted: `labels[b, s]` is `input_ids[b, s]` where supervised, else -100.
            visual_target_mask: [B, S] bool, the placeholders of images that the model learns to generate.
            inputs_embeds: [B, S, H] instead of `input_ids`, for text without images.
            use_cache: defaults to False with `labels`, and with `position_ids` but no mask and no cache, because a
                cache would let packed samples see each other; otherwise to the config's.
            logits_to_keep: compute logits for this many last positions (0: all). None means all without `labels`, and
                no logits with them.
            loss_normalizers: a [`LossNormalizers`], or a tuple of its first values, instead of this batch's own counts.
                `MetaMorphTrainer` passes the counts of the optimizer step.
            num_items_in_batch: supervised text tokens of the optimizer step, passed by plain `transformers.Trainer`.
                The summed text loss is divided by it. The number of visual targets of the step is not known, so the
                mean visual loss of this batch is weighted by the batch's share of these tokens. Ignored with
                `loss_normalizers`.
            generated_visual_tokens: [B, G, D], from `generate`: visual tokens for placeholders among the last G
                positions.
            predict_visual_token: from `generate`: also return `visual_prediction`.
            indices: where images and targets are, from our collators. Without it the model searches itself, and a GPU
                waits for the result.
            **kwargs: passed to the language model. `return_dict=False` returns a tuple.
        """
        kwargs.pop("mm_token_type_ids", None)  # follows from `input_ids`
        may_be_packed = position_ids is not None and attention_mask is None and past_key_values is None
        if use_cache is None and (labels is not None or may_be_packed):
            use_cache = False
        if indices is None and labels is not None:
            indices = index_batch(input_ids, labels, visual_target_mask, self.config.image_token_id)
        mask: Any = attention_mask
        if mask is None and indices is not None and "spans" in indices and self.packed_kernel is not None:
            device = indices["images"].device
            mask = mask_of_samples(self.get_decoder(), indices["spans"], device, self.packed_kernel)
        balances = labels is not None and self._balances_experts
        if balances:
            kwargs["output_router_logits"] = True
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=position_ids,
            pixel_values=pixel_values,
            visual_tokens=visual_tokens,
            visual_tokens_index=visual_tokens_index,
            generated_visual_tokens=generated_visual_tokens,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            image_positions=None if indices is None or input_ids is None else indices["images"],
            return_dict=True,
            **kwargs,
        )
        hidden = outputs.last_hidden_state  # (batch, seq, hidden)
        losses: Any = {}
        if labels is not None and indices is not None:
            losses = MetaMorphOutput()
            if loss_normalizers is None and num_items_in_batch is not None:
                texts, targets = (max(indices[name].shape[0], 1) for name in ("text", "visual"))
                loss_normalizers = LossNormalizers(num_items_in_batch, num_items_in_batch * targets / texts)
            normalizers = LossNormalizers(*(loss_normalizers or ()))
            self._add_losses(losses, hidden.flatten(0, 1), indices, outputs.visual_tokens, normalizers)
            if balances:
                self._add_router_loss(losses, outputs.router_logits, indices, attention_mask, normalizers.aux)
        logits = visual_prediction = None
        if labels is None or logits_to_keep is not None:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.compute_logits(hidden if keep is None else hidden[:, keep])
        if predict_visual_token:
            visual_prediction = self._normalize_visual_tokens(self.vision_head(hidden[:, -1:]))
        return MetaMorphOutput(  # its fields in their order, for `return_dict=False`
            **losses,
            logits=logits,
            visual_prediction=visual_prediction,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """[..., H] -> [..., V], with the logit scaling and capping of the family (Gemma, Cohere, Granite)."""
        return self._transform_logits(self.lm_head(hidden_states), hidden_states)

    def _transform_logits(self, logits: Tensor, hidden_states: Tensor) -> Tensor:
        """Compute the logits from those of `lm_head`: replace the new tokens' of stage 1, then scale and cap."""
        if (embedding := self._tied_new_rows) is not None:
            logits = embedding.replace_logits(logits, hidden_states, getattr(self.lm_head, "bias", None))
        return scale_and_cap_logits(self.config.text_config, logits)

    @property
    def _tied_new_rows(self) -> NewTokenEmbedding | None:
        """The embeddings with trainable new rows, if the head is tied to them."""
        embedding = self.get_input_embeddings()
        return embedding if isinstance(embedding, NewTokenEmbedding) and self.config.tie_word_embeddings else None

    def _text_loss(self, hidden: Tensor, labels: Tensor) -> LossSum:
        """Loss of [positions, H] hidden states that predict `labels` [positions]."""
        if not isinstance(self.lm_head, TextHead):  # an adapter or a quantised layer
            return text_loss(self.compute_logits(hidden), labels)
        embedding = self._tied_new_rows
        modifies = embedding is not None or modifies_logits(self.config.text_config)
        transform = self._transform_logits if modifies else None
        weights = () if embedding is None else (embedding.new_rows,)
        return LossSum.of(self.lm_head(hidden, labels, self.text_loss_options, transform, weights), labels)

    def _add_losses(
        self,
        result: MetaMorphOutput,
        hidden: Tensor,
        indices: BatchIndices,
        visual_tokens: Tensor | None,
        normalizers: LossNormalizers,
    ) -> None:
        """Add the losses of `hidden` [B · S, H] and what is logged about them."""
        text = self._text_loss(hidden.index_select(0, indices["text"]), indices["text_labels"])
        result.text_loss, result.num_text_tokens = average(text, normalizers.text), text.count
        result.text_loss_sum = text.sum.detach()
        result.loss = result.text_loss
        start = self.config.image_start_token_id
        if "image_starts" in indices and start is not None:
            logits = self.compute_logits(hidden.index_select(0, indices["image_starts"]))
            result.num_image_starts = logits.argmax(dim=-1).eq(start).sum()
        if not self.config.use_vision_ar:
            return
        predictions = self.vision_head(hidden.index_select(0, indices["visual"]))  # (targets, features)
        if visual_tokens is None:
            visual_tokens = hidden.new_zeros(0, 1, self.config.vision_feature_size)
        targets = visual_tokens.flatten(0, 1).index_select(0, indices["visual_targets"]).detach()
        visual = visual_loss(
            predictions, targets, normalize=self.config.normalize_vision, apply_softmax=self.config.apply_softmax
        )
        result.visual_loss, result.num_visual_tokens = average(visual, normalizers.visual), visual.count
        result.visual_loss_sum = visual.sum.detach()
        result.visual_cosine_sum = cosine_sum(self._normalize_visual_tokens(predictions), targets)
        result.visual_cosine = result.visual_cosine_sum / visual.count.clamp(min=1)
        places = indices["visual_targets"] % self.config.num_image_tokens  # position of each target in its image
        result.visual_direction_sums = direction_sums(targets, places, self.config.num_image_tokens)
        result.loss = result.text_loss + self.config.vision_coef * result.visual_loss

    @property
    def _balances_experts(self) -> bool:
        """Whether the loss has a load-balancing term: experts are trained, or the configuration asks for it."""
        text = self.config.text_config
        if not router_loss_coefficient(text):
            return False
        if getattr(text, "output_router_logits", False):
            return True
        rows = getattr(self.get_input_embeddings(), "new_rows", None)
        learns = any(weight.requires_grad and weight is not rows for weight in self.get_decoder().parameters())
        return self.training and learns

    def _add_router_loss(
        self,
        result: MetaMorphOutput,
        router_logits: tuple[Tensor, ...] | None,
        indices: BatchIndices,
        attention_mask: Tensor | None,
        normalizer: Tensor | float | None,
    ) -> None:
        """Add the load-balancing loss, a mean over the tokens of the step without padding."""
        tokens = indices.get("tokens")
        if tokens is None and attention_mask is not None:
            tokens = attention_mask.flatten().nonzero().squeeze(-1)
        logits = tuple(router_logits or ())
        if tokens is not None:  # (batch * seq, experts) -> (tokens, experts)
            logits = tuple(layer.flatten(0, -2).index_select(0, tokens.to(layer.device)) for layer in logits)
        mean = router_loss(self.get_decoder(), logits)
        if mean is None or result.loss is None:
            return
        aux = LossSum.of(mean * logits[0].shape[0], logits[0])
        result.aux_loss, result.num_tokens, result.aux_loss_sum = average(aux, normalizer), aux.count, aux.sum.detach()
        result.loss = result.loss + router_loss_coefficient(self.config.text_config) * result.aux_loss

    def _normalize_visual_tokens(self, predictions: Tensor) -> Tensor:
        return normalize_visual_tokens(
            predictions, normalize=self.config.normalize_vision, apply_softmax=self.config.apply_softmax
        )

    def _declare_tied_weights(self) -> None:
        # Per instance, because the name of the embedding table differs between language models.
        table = self.get_input_embeddings()
        name = next(name for name, module in self.named_modules() if module is table)
        self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"} if self.config.tie_word_embeddings else {}


AutoModel.register(MetaMorphConfig, MetaMorphModel, exist_ok=True)
AutoModelForImageTextToText.register(MetaMorphConfig, MetaMorphForConditionalGeneration, exist_ok=True)
AutoModelForMultimodalLM.register(MetaMorphConfig, MetaMorphForConditionalGeneration, exist_ok=True)
