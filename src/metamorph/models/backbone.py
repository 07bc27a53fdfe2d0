"""The backbone: encodes images to visual tokens, joins them with the text, and runs the decoder.

Shape legend: B batch, S sequence, H hidden size of the language model, I images in the batch, N visual tokens per
image, D features of one visual token.
"""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import can_return_tuple

from .configuration_metamorph import MetaMorphConfig
from .families import embedding_scale
from .outputs import MetaMorphModelOutput
from .pretrained import hub_options, load_checked, load_config
from .projectors import build_mm_projector
from .vision_tower import VisionTower, is_sharded


class MetaMorphPreTrainedModel(PreTrainedModel):
    """Base class of the MetaMorph models: loading, saving and placement."""

    config_class = MetaMorphConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ("past_key_values",)
    # Attention is in the two parts only; whether they support a backend is checked when they are built.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *args: Any,
        config: PreTrainedConfig | str | Path | None = None,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load a model as in Transformers, but never run code that comes with it, and never start weights at random.

        Weights that are missing, unknown, of another shape, or not finite are a `ValueError`.
        """
        described = config
        if not isinstance(described, PreTrainedConfig):
            described = load_config(config or pretrained_model_name_or_path, cls.config_class, **hub_options(kwargs))
        model, info = load_checked(
            partial(super().from_pretrained, config=config),
            pretrained_model_name_or_path,
            described,
            lambda: cls(copy.deepcopy(described)),
            **kwargs,
        )
        return (model, info) if output_loading_info else model


class MetaMorphModel(MetaMorphPreTrainedModel):
    """Vision tower, connector and decoder, without output heads."""

    _keys_to_ignore_on_load_unexpected = (r"^lm_head\.", r"^vision_head\.")

    def __init__(self, config: MetaMorphConfig):
        super().__init__(config)
        self.vision_tower = VisionTower(config)
        self.mm_projector = build_mm_projector(config)
        self.language_model = AutoModel.from_config(config.text_config, trust_remote_code=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The embedding table of the language model."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding table of the language model."""
        self.language_model.set_input_embeddings(value)

    @can_return_tuple
    def get_image_features(self, pixel_values: Tensor) -> BaseModelOutputWithPooling:
        """Encode [I, 3, height, width] images as the language model sees them.

        Returns `pooler_output` [I, N, H], the embeddings at the placeholders, and `last_hidden_state` [I, N, D], the
        visual tokens that the connector projects.
        """
        visual_tokens = self.vision_tower(pixel_values)
        table: Any = self.get_input_embeddings()
        projected = self._project(visual_tokens, table.weight.dtype)
        return BaseModelOutputWithPooling(last_hidden_state=visual_tokens, pooler_output=projected)

    def encode_images(
        self,
        pixel_values: Tensor | None,
        visual_tokens: Tensor | None = None,
        visual_tokens_index: Tensor | None = None,
    ) -> Tensor | None:
        """Encode [P, 3, height, width] images of a batch to [P + V, N, D] in reading order; None without images.

        [V, N, D] `visual_tokens` are images that are encoded already, and `visual_tokens_index` their positions among
        all images, required if there are both.
        """
        if pixel_values is None or not pixel_values.shape[0]:
            return visual_tokens
        encoded = self.vision_tower(pixel_values)
        if visual_tokens is None:
            return encoded
        count = len(encoded) + len(visual_tokens)
        if visual_tokens_index is None or len(visual_tokens_index) != len(visual_tokens):
            raise ValueError(
                "give pixel_values or visual_tokens, or say by visual_tokens_index which images of the batch the "
                "visual tokens are"
            )
        is_given = torch.zeros(count, dtype=torch.bool, device=encoded.device)
        is_given[visual_tokens_index.to(encoded.device)] = True
        merged = encoded.new_empty(count, *encoded.shape[1:])
        merged[is_given] = visual_tokens.to(encoded)
        merged[~is_given] = encoded
        return merged

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        visual_tokens: Tensor | None = None,
        visual_tokens_index: Tensor | None = None,
        generated_visual_tokens: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        image_positions: Tensor | None = None,
        **kwargs: Any,
    ) -> MetaMorphModelOutput:
        """See [`MetaMorphForConditionalGeneration.forward`]."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        visual_tokens = self.encode_images(pixel_values, visual_tokens, visual_tokens_index)
        is_step = generated_visual_tokens is not None  # of `generate`: no rank encodes images
        if visual_tokens is None and input_ids is not None and not is_step and self._tower_takes_part():
            visual_tokens = self._encode_no_images(input_ids.device)
        if input_ids is not None:
            inputs_embeds = self.embed(input_ids, visual_tokens, generated_visual_tokens, image_positions)
        elif visual_tokens is not None:
            raise ValueError("images need input_ids, whose placeholders say where they belong; inputs_embeds have none")
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        return MetaMorphModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            visual_tokens=visual_tokens,
            router_logits=getattr(outputs, "router_logits", None),
        )

    def embed(
        self,
        input_ids: Tensor,
        visual_tokens: Tensor | None,
        generated_visual_tokens: Tensor | None = None,
        image_positions: Tensor | None = None,
    ) -> Tensor:
        """Embed text tokens, and put the projected visual tokens at the placeholders: [B, S] -> [B, S, H].

        [I, N, D] `visual_tokens` fill placeholders in reading order, except those among the last G positions if there
        are [B, G, D] `generated_visual_tokens`. `image_positions` are those of [`BatchIndices`], if known.
        """
        embeds = self.get_input_embeddings()(input_ids)  # (batch, seq, hidden)
        input_ids = input_ids.to(embeds.device)  # with a device map, the table may be on another one
        if (scale := embedding_scale(self.config.text_config)) != 1.0:
            embeds = embeds * scale
        if generated_visual_tokens is not None:
            count = generated_visual_tokens.shape[1]
            is_placeholder = input_ids == self.config.image_token_id  # (batch, seq)
            projected = self._project(generated_visual_tokens, embeds.dtype).to(embeds.device)  # (batch, count, hidden)
            last = torch.where(is_placeholder[:, -count:, None], projected, embeds[:, -count:])
            embeds = torch.cat([embeds[:, :-count], last], dim=1) if count < embeds.shape[1] else last
            if visual_tokens is None:
                return embeds
            is_placeholder[:, -count:] = False
            image_positions = is_placeholder.flatten().nonzero().squeeze(-1)
        elif image_positions is None:
            image_positions = (input_ids == self.config.image_token_id).flatten().nonzero().squeeze(-1)
        if visual_tokens is None:
            # No images still pass through the connector: its parameters stay in the graph (with gradient 0), and
            # data-parallel ranks without images take part in every collective operation.
            visual_tokens = embeds.new_zeros(0, self.config.num_image_tokens, self.config.vision_feature_size)
        wanted = visual_tokens.shape[0] * visual_tokens.shape[1]
        if image_positions.shape[0] != wanted:
            raise ValueError(
                f"input_ids hold {image_positions.shape[0]} image placeholders, but {visual_tokens.shape[0]} images "
                f"with {visual_tokens.shape[1]} visual tokens each need {wanted}; prepare both with this model's "
                "processor"
            )
        projected = self._project(visual_tokens, embeds.dtype).flatten(0, 1).to(embeds.device)  # (images * N, hidden)
        return embeds.flatten(0, 1).index_copy(0, image_positions, projected).view_as(embeds)

    def _tower_takes_part(self) -> bool:
        """Whether to call the tower even without images, because all data-parallel ranks must do the same.

        That is the case while a weight of it or of the reduction is trained, and, also in evaluation, while its weights
        are sharded (FSDP2, ZeRO-3): every rank must help to gather them.
        """
        learns = self.training and torch.is_grad_enabled()
        return is_sharded(self.vision_tower) or (
            learns and any(weight.requires_grad for weight in self.vision_tower.parameters())
        )

    def _encode_no_images(self, device: torch.device) -> Tensor:
        """[0, N, D] visual tokens: one grey image passes through the tower, and nothing of it is used.

        It is encoded where images would be, before the embeddings: ZeRO-3 hangs when ranks call modules in different
        orders.
        """
        tower = self.vision_tower
        return tower(torch.zeros(1, 3, tower.image_size, tower.image_size, device=device))[:0]

    def _project(self, visual_tokens: Tensor, dtype: torch.dtype) -> Tensor:
        return self.mm_projector(visual_tokens.to(dtype)).to(dtype)  # (..., hidden)
