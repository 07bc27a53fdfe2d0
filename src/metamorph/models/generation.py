"""Interleaved generation on Transformers' own `generate`: a grammar for images, visual tokens fed back, typed output.

Text and images share one sequence and one key/value cache. A row is inside an image when its last token is
`<image_start>` or a placeholder. This state is read off the ids: each row has its own, and none can get stuck.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, LogitsProcessor, LogitsProcessorList
from transformers.generation import GenerateDecoderOnlyOutput

from .configuration_metamorph import MetaMorphConfig


UNSUPPORTED_ARGUMENTS = (
    "assistant_model",
    "assistant_tokenizer",
    "custom_generate",
    "inputs_embeds",
    "negative_prompt_attention_mask",
    "negative_prompt_ids",
    "trust_remote_code",
)
"""Arguments of Transformers' `generate` that ours refuses."""
UNSUPPORTED_FIELDS: Mapping[str, tuple[Any, ...]] = {
    "assistant_early_exit": (),
    "assistant_ensemble_weight": (),
    "constraints": (),
    "continuous_batching_config": (),
    "dola_layers": (),
    "force_words_ids": (),
    "guidance_scale": (1,),
    "is_assistant": (False,),
    "num_beam_groups": (1,),
    "num_beams": (1,),
    "penalty_alpha": (0,),
    "prefill_chunk_size": (),
    "prompt_lookup_num_tokens": (),
    "speculation_type": (),
    "token_healing": (False,),
    "use_mtp": (False,),
}
"""Fields of `GenerationConfig` that ours refuses -> values, besides None, that have no effect."""


@dataclass
class MetaMorphGenerateOutput(GenerateDecoderOnlyOutput):
    """What `generate` returns: Transformers' own fields (`sequences`, `scores`, …) and the images."""

    visual_tokens: Tensor | None = None
    """[images, N, D] the generated images in reading order (row by row). Empty if there are none."""
    num_images: Tensor | None = None
    """[batch] generated images of each row."""

    def __getitem__(self, key: Any) -> Any:
        """As in Transformers; a tuple (`output[:, length:]`, written for plain tensors) indexes the sequences."""
        return self.sequences[key] if isinstance(key, tuple) else super().__getitem__(key)


class ImageGrammarLogitsProcessor(LogitsProcessor):
    """Forces `<image_start>` → exactly N placeholders → `<image_end>`, and nothing else inside images.

    Outside an image, placeholders and `<image_end>` are impossible, and so is `<image_start>` unless `allow_images`, or
    when the image would not fit into `max_length`, the tokens of prompt and answer together. Both may be [batch].
    """

    def __init__(self, config: MetaMorphConfig, max_length: int | Tensor, allow_images: bool | Tensor = True):
        self.placeholder, self.num_image_tokens = config.image_token_id, config.num_image_tokens
        start, end = config.image_start_token_id, config.image_end_token_id
        self.can_draw = start is not None and end is not None and config.use_vision_ar
        self.start, self.end = (-1 if token is None else token for token in (start, end))
        self.max_length = torch.as_tensor(max_length)
        # [batch] or a scalar: the longest row that may begin an image, with its start and end
        self.last_start = torch.where(torch.as_tensor(allow_images), self.max_length - self.num_image_tokens - 2, -1)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Mask [batch, vocabulary] scores, given all [batch, length] ids so far."""
        if not self.can_draw:
            scores = scores.clone()
            scores[:, [i for i in (self.placeholder, self.start, self.end) if i >= 0]] = -torch.inf
            return scores
        begun = self._tokens_since_start(input_ids)  # [batch], -1 outside an image
        inside = begun >= 0
        self.last_start = self.last_start.to(scores.device)
        scores = scores.masked_fill(inside.unsqueeze(-1), -torch.inf)
        scores[:, self.placeholder] = scores[:, self.end] = -torch.inf
        scores[:, self.start].masked_fill_(self.last_start < input_ids.shape[1], -torch.inf)
        forced = torch.where(begun < self.num_image_tokens, self.placeholder, self.end)
        only = torch.where(inside, 0.0, -torch.inf).to(scores.dtype)  # outside, the forced ones are impossible too
        return scores.scatter_(1, forced.unsqueeze(-1), only.unsqueeze(-1))

    def check_prompt(self, input_ids: Tensor) -> None:
        """Raise a `ValueError` if a prompt [batch, length] begins an image that does not fit."""
        left = (self.max_length.to(input_ids.device) - input_ids.shape[1]).clamp(min=0).expand(input_ids.shape[0])
        begins = input_ids[:, -1].eq(self.start)
        if self.can_draw and (begins & (left < self.num_image_tokens + 1)).any():
            raise ValueError(
                f"the prompt begins an image, which needs {self.num_image_tokens + 1} more tokens, but the answer may "
                f"have {left[begins].min()}: give a larger max_new_tokens"
            )

    def _tokens_since_start(self, input_ids: Tensor) -> Tensor:
        """[batch] placeholders after an open `<image_start>` at the end of each row; -1 if no image is open."""
        window = input_ids[:, -(self.num_image_tokens + 1) :]
        places = torch.arange(window.shape[1], device=window.device)
        last = window.ne(self.placeholder).mul(places).amax(dim=1, keepdim=True)  # of the other tokens; 0 without one
        opened = window.gather(1, last).eq(self.start)
        return torch.where(opened, window.shape[1] - 1 - last, -1).squeeze(1)


@dataclass
class GeneratedVisualTokens:
    """What `generate` carries from step to step: the vision head's predictions, and which rows may write images."""

    allow_images: bool | Tensor = True
    """Also [batch]."""
    max_new_tokens: Tensor | None = None
    """[batch] limits of the rows: an image that would not fit is not begun. Whoever gives them ends the rows."""
    steps: list[Tensor] = field(default_factory=list)  # (batch, 1, features) each, for the token that is chosen next

    def last(self, count: int) -> Tensor:
        """[batch, count, D] predictions for the last `count` tokens."""
        return torch.cat(self.steps[-count:], dim=1)

    def images(self, sequences: Tensor, prompt_length: int, config: MetaMorphConfig) -> tuple[Tensor, Tensor]:
        """Collect the complete images of `sequences` [batch, prompt_length + steps].

        Returns [images, N, D] in reading order, and [batch] images of each row. An image that a stopping criterion
        (such as a time limit) cut short is left out.
        """
        size = config.num_image_tokens
        chosen = sequences[:, prompt_length:] == config.image_token_id  # (batch, generated)
        num_images = chosen.sum(dim=1) // size
        if not num_images.any():
            return torch.empty(0, size, config.vision_feature_size, device=sequences.device), num_images
        # (batch, generated, features); with a device map, the vision head may be on another device than the ids
        predictions = self.last(len(self.steps))[:, : chosen.shape[1]].to(sequences.device)
        rows = [predictions[b][chosen[b]][: int(n) * size] for b, n in enumerate(num_images)]
        return torch.cat(rows).reshape(-1, size, predictions.shape[-1]), num_images


class MetaMorphGenerationMixin(GenerationMixin):
    """`generate` for models that write images; the class it is mixed into defines `config` and `model`."""

    config: MetaMorphConfig
    model: Any
    visualizer: Callable[[Tensor], list[Image.Image]] | None = None
    """Draws [images, N, D] visual tokens; set by `metamorph.load`, and not saved with the model."""

    @property
    def output_modalities(self) -> tuple[str, ...]:
        """What the model writes, as Transformers' pipelines ask: `text`, and `image` unless it was trained without."""
        config = self.config
        return ("image", "text") if config.use_vision_ar and config.image_start_token_id is not None else ("text",)

    @property
    def context_length(self) -> int | None:
        """Most tokens of a prompt and its answer; None for language models that name none (Bloom, MPT, Mamba, …)."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        pixel_values: Tensor | None = None,
        visual_tokens: Tensor | None = None,
        visual_tokens_index: Tensor | None = None,
        allow_images: bool = True,
        generation_mode: str | None = None,
        return_dict_in_generate: bool | None = None,
        generated_state: GeneratedVisualTokens | None = None,
        **kwargs: Any,
    ) -> MetaMorphGenerateOutput | Tensor:
        """Generate text and images. Arguments of Transformers' `generate` work, or are refused by name
        (beam search, assisted decoding, …).

        A prompt that ends in `<image_start>` makes the model begin with an image. `max_new_tokens` counts visual tokens
        like any other; an image that would not fit is not begun.

        Args:
            inputs: [batch, length] prompt ids, left-padded (or pass them as `input_ids`).
            generation_config: defaults to the model's; single fields may be given as keyword arguments instead.
            pixel_values: [images, 3, height, width] images of the prompts in reading order.
            visual_tokens: [images, N, D] images that are encoded or generated already (earlier turns of a chat).
            visual_tokens_index: [images] their positions among all images, if there are `pixel_values` too.
            allow_images: False makes the answer text only.
            generation_mode: `image` begins every answer with an image: `<image_start>` is added to the prompts. For
                Transformers' pipelines it returns [batch, 1, N, D], the visual tokens of these images, unless
                `return_dict_in_generate` is True. `text` is `allow_images=False`.
            return_dict_in_generate: False, here or in a generation configuration, returns only [batch, length]
                `sequences`, the default of Transformers' `generate`.
            generated_state: an object to collect the visual tokens in, instead of `allow_images`: for streamers and
                stopping criteria that read them while they are generated, and for limits of single rows.
            **kwargs: `max_new_tokens`, `do_sample`, `temperature`, `streamer`, `attention_mask`, …
        """
        inputs = kwargs.pop("input_ids", inputs)
        if inputs is None:
            raise ValueError("generate needs input_ids: a prompt given as inputs_embeds has no place for images")
        for name in UNSUPPORTED_ARGUMENTS:
            if kwargs.get(name) is not None and kwargs[name] is not False:
                raise ValueError(_refusal(name))
        if generation_mode not in (None, *self.output_modalities):
            raise ValueError(f"generation_mode {generation_mode!r} is not one of {', '.join(self.output_modalities)}")
        if generation_mode == "image":
            inputs = self._begin_images(inputs, kwargs)
        allow_images = allow_images and generation_mode != "text"
        self._prepare_generation_config(generation_config, **kwargs)  # refuses before the images are encoded
        visual_tokens = self.model.encode_images(pixel_values, visual_tokens, visual_tokens_index)
        state = generated_state or GeneratedVisualTokens(allow_images)
        output = super().generate(
            inputs, generation_config, visual_tokens=visual_tokens, generated_state=state, **kwargs
        )
        configs = (generation_config, self.generation_config)
        asked = (return_dict_in_generate, *(config and config.return_dict_in_generate for config in configs))
        returns_all = next((value for value in asked if value is not None), generation_mode != "image")
        if not returns_all and generation_mode != "image":
            return output.sequences
        images, num_images = state.images(output.sequences, inputs.shape[1], self.config)
        if not returns_all:
            if not num_images.all():
                raise ValueError("a stopping criterion, such as a time limit, ended an answer within its image")
            # An extra dimension, because the pipelines flatten the first two of three.
            return images[num_images.cumsum(0) - num_images].unsqueeze(1)
        return MetaMorphGenerateOutput(**output, visual_tokens=images, num_images=num_images)

    def decode_image_tokens(self, visual_tokens: Tensor) -> list[Image.Image]:
        """Draw [..., N, D] visual tokens, for Transformers' pipelines. Without a visualizer it is a `ValueError`."""
        if self.visualizer is None:
            raise ValueError(
                "there is no visualizer: load the model by metamorph.load with one, or set model.visualizer"
            )
        return self.visualizer(visual_tokens.flatten(0, -3))

    def _begin_images(self, input_ids: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """The prompts with `<image_start>` at their ends; what has a value for each token gets one more in `kwargs`."""
        for name, value in (("attention_mask", 1), ("mm_token_type_ids", 0)):
            if kwargs.get(name) is not None:
                kwargs[name] = F.pad(kwargs[name], (0, 1), value=value)
        return F.pad(input_ids, (0, 1), value=self.config.image_start_token_id)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: continuous batching joins rows of different requests, and knows only ids."""
        raise ValueError(_refusal("continuous batching (generate_batch)"))

    generate_batch = continuous_batching_context_manager = init_continuous_batching

    def _prepare_generation_config(self, *args: Any, **kwargs: Any) -> tuple[GenerationConfig, dict[str, Any]]:
        """Merge arguments, `generation_config` and the model's own, and check the result."""
        config, model_kwargs = super()._prepare_generation_config(*args, **kwargs)
        for name, harmless in UNSUPPORTED_FIELDS.items():
            value = getattr(config, name, None)  # not in every release of Transformers
            if value is not None and value not in harmless:
                raise ValueError(_refusal(f"{name}={value}"))
        if config.cache_implementation == "paged":
            raise ValueError(_refusal("cache_implementation='paged' (continuous batching)"))
        config.return_dict_in_generate = True
        return config, model_kwargs

    def _get_logits_processor(
        self,
        generation_config: GenerationConfig,
        *args: Any,
        encoder_input_ids: Tensor | None = None,
        logits_processor: LogitsProcessorList | None = None,
        model_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> LogitsProcessorList:
        """Add the grammar, whose lengths are known here, after the caller's processors, but before `RowSampler`."""
        state = (model_kwargs or {}).get("generated_state")
        if state is not None:
            # A forced end of sequence takes the last place.
            length: Any = generation_config.max_length - (generation_config.forced_eos_token_id is not None)
            if state.max_new_tokens is not None and encoder_input_ids is not None:
                length = (encoder_input_ids.shape[1] + state.max_new_tokens).clamp(max=length)
            grammar = ImageGrammarLogitsProcessor(self.config, length, allow_images=state.allow_images)
            if encoder_input_ids is not None:
                grammar.check_prompt(encoder_input_ids)
            given = list(logits_processor or [])
            given.sort(key=lambda processor: getattr(processor, "is_last", False))  # what chooses a token is last
            first = sum(not getattr(processor, "is_last", False) for processor in given)
            logits_processor = LogitsProcessorList([*given[:first], grammar, *given[first:]])
        return super()._get_logits_processor(
            generation_config,
            *args,
            encoder_input_ids=encoder_input_ids,
            logits_processor=logits_processor,
            model_kwargs=model_kwargs,
            **kwargs,
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Any = None,
        visual_tokens: Tensor | None = None,
        generated_state: GeneratedVisualTokens | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Add the visual tokens that the current step needs."""
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        cached = kwargs.get("use_cache", True)
        steps = len(generated_state.steps) if generated_state is not None else 0
        if generated_state is not None and steps:
            inputs["generated_visual_tokens"] = generated_state.last(1 if cached else steps)
        if visual_tokens is not None and (is_first_iteration or not cached):
            prompt_length = inputs["input_ids"].shape[1]
            inputs["visual_tokens"] = self._uncached_images(input_ids, prompt_length, visual_tokens, steps)
        inputs["predict_visual_token"] = generated_state is not None and self.config.use_vision_ar
        return inputs

    def _uncached_images(self, input_ids: Tensor, length: int, visual_tokens: Tensor, steps: int) -> Tensor:
        """Drop the images in the cached prefix (a chat continued from an earlier cache)."""
        prefix = input_ids.shape[1] - length
        if prefix == 0:
            return visual_tokens
        rows = self._images_of_rows(input_ids[:, : input_ids.shape[1] - steps], visual_tokens)
        dropped = self._num_images(input_ids[:, :prefix])
        return torch.cat([row[n:] for row, n in zip(rows, dropped, strict=True)])

    def _num_images(self, input_ids: Tensor) -> list[int]:
        return (input_ids.eq(self.config.image_token_id).sum(dim=1) // self.config.num_image_tokens).tolist()

    def _images_of_rows(self, input_ids: Tensor, visual_tokens: Tensor) -> tuple[Tensor, ...]:
        return visual_tokens.split(self._num_images(input_ids))  # (images of the row, N, D) each

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], **kwargs: Any
    ) -> dict[str, Any]:
        state = model_kwargs.get("generated_state")
        if state is not None and outputs.visual_prediction is not None:
            # Cloned: CUDA graphs write every step's prediction into the same memory.
            state.steps.append(outputs.visual_prediction.clone())
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, **kwargs)
        positions, context = model_kwargs.get("position_ids"), self.context_length
        if state is not None and state.max_new_tokens is not None and positions is not None and context is not None:
            # Rows that have ended are computed until the last one ends: learned positions have no row for that.
            model_kwargs["position_ids"] = positions.clamp(max=context - 1)
        return model_kwargs

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, input_ids: Tensor | None = None, **model_kwargs: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        """Repeat rows for `num_return_sequences`; images are repeated with their row, not one by one."""
        visual_tokens = model_kwargs.pop("visual_tokens", None)
        if visual_tokens is not None and input_ids is not None and expand_size > 1:
            rows = self._images_of_rows(input_ids, visual_tokens)
            visual_tokens = torch.cat([row for row in rows for _ in range(expand_size)])
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, input_ids=input_ids, **model_kwargs
        )
        if visual_tokens is not None:
            model_kwargs["visual_tokens"] = visual_tokens
        return input_ids, model_kwargs


def _refusal(what: str) -> str:
    return (
        f"{what} is not supported by MetaMorph's generate, which decodes one row and one step at a time, by greedy "
        "search or sampling"
    )
