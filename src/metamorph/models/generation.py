"""Interleaved decoding on Transformers' own `generate`: a grammar for images, visual tokens fed back, typed result.

Text and images share one sequence and one key/value cache. A row of the batch is in image mode when its last token is
`<image_start>` or a placeholder; the state is read off the ids, so each row has its own and nothing can get stuck.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, LogitsProcessor, LogitsProcessorList
from transformers.generation import GenerateDecoderOnlyOutput

from .configuration_metamorph import MetaMorphConfig


@dataclass
class MetaMorphGenerateOutput(GenerateDecoderOnlyOutput):
    """What `generate` returns: Transformers' own fields (`sequences`, `scores`, …) and the images."""

    visual_tokens: Tensor | None = None
    """[images, N, D] the generated images in reading order (row by row). Empty if there are none."""
    num_images: Tensor | None = None
    """[batch] generated images of each row."""


class ImageGrammarLogitsProcessor(LogitsProcessor):
    """Forces `<image_start>` → exactly N placeholders → `<image_end>`, and forbids everything else around images.

    Outside an image, placeholders and `<image_end>` are impossible; `<image_start>` is too when the image would not
    fit into `max_length`. Inside, text tokens (end-of-sequence among them) are impossible.

    Args:
        config: of the model; gives the token ids and N.
        max_length: prompt and answer together, in tokens.
        allow_images: False forbids images altogether.
    """

    def __init__(self, config: MetaMorphConfig, max_length: int, allow_images: bool = True):
        self.placeholder = config.image_token_id
        has_markers = config.image_start_token_id is not None and config.image_end_token_id is not None
        self.can_draw = has_markers and config.use_vision_ar
        self.start = config.image_start_token_id if config.image_start_token_id is not None else -1
        self.end = config.image_end_token_id if config.image_end_token_id is not None else -1
        self.num_image_tokens = config.num_image_tokens
        self.max_length = max_length
        self.allow_images = allow_images

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Masks scores.

        Args:
            input_ids: [batch, length] everything so far.
            scores: [batch, vocabulary]
        """
        scores = scores.clone()
        if not self.can_draw:
            scores[:, [i for i in (self.placeholder, self.start, self.end) if i >= 0]] = -torch.inf
            return scores
        begun = self._tokens_since_start(input_ids)  # [batch], -1 outside an image
        forced = torch.where(begun < self.num_image_tokens, self.placeholder, self.end)
        inside = (begun >= 0).unsqueeze(-1)
        fits = input_ids.shape[1] + self.num_image_tokens + 2 <= self.max_length
        forbidden = [self.placeholder, self.end] + ([] if fits and self.allow_images else [self.start])
        scores[:, forbidden] = -torch.inf
        only_forced = torch.full_like(scores, -torch.inf).scatter_(1, forced.unsqueeze(-1), 0.0)
        return torch.where(inside, only_forced, scores)

    def _tokens_since_start(self, input_ids: Tensor) -> Tensor:
        """Placeholders since an open `<image_start>` at the end of each row; -1 if no image is open."""
        window = input_ids[:, -(self.num_image_tokens + 1) :]
        run = window.eq(self.placeholder).flip(1).long().cumprod(dim=1).sum(dim=1)  # trailing placeholders
        before = (window.shape[1] - 1 - run).clamp(min=0)
        opened = window.gather(1, before.unsqueeze(1)).squeeze(1).eq(self.start) & (run < window.shape[1])
        return torch.where(opened, run, -1)


class GeneratedVisualTokens:
    """The vision head's prediction after every decoding step; `generate` carries it from step to step."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def append(self, prediction: Tensor) -> None:
        """Adds [batch, 1, D], the candidate for the token that is about to be chosen."""
        self.steps.append(prediction)

    def last(self, count: int) -> Tensor:
        """[batch, count, D] the candidates of the last `count` tokens."""
        return torch.cat(self.steps[-count:], dim=1)

    def images(
        self, sequences: Tensor, prompt_length: int, placeholder: int, size: int, features: int
    ) -> tuple[Tensor, Tensor]:
        """Collects the complete images.

        Args:
            sequences: [batch, prompt_length + steps] with the chosen tokens.
            prompt_length: tokens before the first generated one.
            placeholder: token id of visual tokens.
            size: visual tokens of one image (N).
            features: features of one visual token (D).

        Returns:
            [images, N, D] in reading order, and [batch] images of each row. An image that a stopping criterion
            (a time limit, say) cut short is left out.
        """
        chosen = sequences[:, prompt_length:] == placeholder  # [batch, generated]
        num_images = chosen.sum(dim=1) // size
        if not num_images.any():
            return torch.empty(0, size, features, device=sequences.device), num_images
        candidates = self.last(len(self.steps))[:, : chosen.shape[1]]
        rows = [candidates[b][chosen[b]][: int(n) * size] for b, n in enumerate(num_images)]
        return torch.cat(rows).reshape(-1, size, candidates.shape[-1]), num_images


class MetaMorphGenerationMixin(GenerationMixin):
    """`generate` for models that write images. The class it is mixed into defines `config` and `get_visual_tokens`."""

    config: MetaMorphConfig

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        *,
        pixel_values: Tensor | None = None,
        visual_tokens: Tensor | None = None,
        logits_processor: LogitsProcessorList | None = None,
        allow_images: bool = True,
        return_dict_in_generate: bool = True,
        **kwargs: Any,
    ) -> MetaMorphGenerateOutput | Tensor:
        """Generates text and images. Everything that Transformers' `generate` takes works, except beam search.

        A prompt that ends in `<image_start>` makes the model begin with an image. `max_new_tokens` counts visual
        tokens like any other; an image that does not fit any more is not begun.

        Args:
            inputs: [batch, length] prompt ids, left padded (or pass them as `input_ids`).
            pixel_values: [images, 3, height, width] images of the prompts in reading order.
            visual_tokens: [images, N, D] the same, already encoded or generated (earlier turns of a chat).
            logits_processor: applied before the image grammar.
            allow_images: False makes the answer text only.
            return_dict_in_generate: False returns `sequences` alone, as plain `generate` does by default.
            **kwargs: `max_new_tokens`, `do_sample`, `temperature`, `streamer`, `attention_mask`, …

        Returns:
            [`MetaMorphGenerateOutput`], or [batch, length] ids.

        Raises:
            ValueError: beam search, assisted decoding or chunked prefill is asked for, or the prompt's placeholders
                and images disagree.
        """
        inputs = kwargs.pop("input_ids", inputs)
        if inputs is None:
            raise ValueError("generate needs input_ids: a prompt given as inputs_embeds has no place for images")
        self._refuse_unsupported(kwargs)
        if pixel_values is not None and pixel_values.shape[0]:
            if visual_tokens is not None:
                raise ValueError("give pixel_values or visual_tokens, not both")
            visual_tokens = self.get_visual_tokens(pixel_values)
        state = GeneratedVisualTokens()
        max_length = self._max_length(inputs.shape[1], kwargs)
        grammar = ImageGrammarLogitsProcessor(self.config, max_length, allow_images=allow_images)
        output = super().generate(
            inputs,
            visual_tokens=visual_tokens,
            generated_state=state,
            logits_processor=LogitsProcessorList([*(logits_processor or []), grammar]),
            return_dict_in_generate=True,
            **kwargs,
        )
        if not return_dict_in_generate:
            return output.sequences
        config = self.config
        images, num_images = state.images(
            output.sequences,
            inputs.shape[1],
            placeholder=config.image_token_id,
            size=config.num_image_tokens,
            features=config.vision_feature_size,
        )
        return MetaMorphGenerateOutput(**output, visual_tokens=images, num_images=num_images)

    def _refuse_unsupported(self, kwargs: dict[str, Any]) -> None:
        config = kwargs.get("generation_config") or self.generation_config
        for name, allowed in (("num_beams", (None, 1)), ("prefill_chunk_size", (None,))):
            value = kwargs.get(name, getattr(config, name, None))
            if value not in allowed:
                raise ValueError(f"{name}={value} is not supported: visual tokens are decoded step by step")
        if kwargs.get("assistant_model") is not None or kwargs.get("inputs_embeds") is not None:
            raise ValueError("assistant_model and inputs_embeds are not supported by MetaMorph's generate")

    def _max_length(self, prompt_length: int, kwargs: dict[str, Any]) -> int:
        """The length at which Transformers' own `generate` will stop, needed before it starts."""
        config = kwargs.get("generation_config") or self.generation_config
        new_tokens = kwargs.get("max_new_tokens", config.max_new_tokens)
        if new_tokens is not None:
            return prompt_length + new_tokens
        max_length = kwargs.get("max_length", config.max_length)
        # Transformers' fallback when nothing is set: 20 new tokens.
        return max_length if max_length is not None else prompt_length + 20

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
        """Adds the visual tokens that the current step needs to what Transformers prepares."""
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
        """Drops the images that lie wholly in the cached prefix (a chat that goes on from an earlier cache)."""
        prefix = input_ids.shape[1] - length
        if prefix == 0:
            return visual_tokens
        prompt = input_ids[:, : input_ids.shape[1] - steps]
        is_placeholder = prompt.eq(self.config.image_token_id)
        total = is_placeholder.sum(dim=1) // self.config.num_image_tokens
        dropped = is_placeholder[:, :prefix].sum(dim=1) // self.config.num_image_tokens
        rows = visual_tokens.split(total.tolist())
        return torch.cat([row[int(n) :] for row, n in zip(rows, dropped, strict=True)])

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], **kwargs: Any
    ) -> dict[str, Any]:
        state = model_kwargs.get("generated_state")
        if state is not None and outputs.visual_prediction is not None:
            state.append(outputs.visual_prediction)
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, **kwargs)

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, input_ids: Tensor | None = None, **model_kwargs: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        """Repeats rows for `num_return_sequences`; images are repeated with their row, not one by one."""
        visual_tokens = model_kwargs.pop("visual_tokens", None)
        if visual_tokens is not None and input_ids is not None and expand_size > 1:
            per_row = input_ids.eq(self.config.image_token_id).sum(dim=1) // self.config.num_image_tokens
            rows = visual_tokens.split(per_row.tolist())
            visual_tokens = torch.cat([row for row in rows for _ in range(expand_size)])
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, input_ids=input_ids, **model_kwargs
        )
        if visual_tokens is not None:
            model_kwargs["visual_tokens"] = visual_tokens
        return input_ids, model_kwargs
