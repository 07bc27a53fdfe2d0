"""The processor, called as Transformers' processors are: prompts or messages and images to inputs of the model."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from transformers import AutoProcessor, BatchFeature
from transformers.processing_utils import MultiModalData, Unpack

from metamorph.models.configuration_metamorph import MetaMorphConfig
from metamorph.models.conversation_processor import ConversationProcessor
from metamorph.models.processing_kwargs import MetaMorphProcessingKwargs, ProcessorOptions, is_processor_argument
from metamorph.models.sequence.answers import interleave
from metamorph.models.sequence.chat_templates import get_chat_template
from metamorph.models.sequence.conversation_encoder import ConversationEncoder
from metamorph.models.sequence.conversations import (
    ImagePart,
    SequenceBuilder,
    TextPart,
    assign_images,
    divide_images,
    flatten_images,
    parse_messages,
)


logger = logging.getLogger(__name__)

_MAX_TEMPLATES = 8
"""Templates for single calls that are kept."""


class MetaMorphProcessor(ConversationProcessor):
    """Joins an image processor and a tokenizer, and builds the model's sequences.

    Args:
        image_processor: Image processor of the vision tower (SigLIP, SigLIP 2, CLIP or DINOv2). A copy is kept
            that makes exact squares.
        tokenizer: Tokenizer of the language model. The image tokens are added to it if it lacks them.
        chat_template: Jinja template for `version="auto"`; by default the tokenizer's own.
        num_image_tokens: Number of placeholders for each image.
        version: Name of the conversation template, see `metamorph.models.sequence.constants.VERSIONS`.
        mm_use_im_start_end: Whether images stand between `<image_start>` and `<image_end>`.
        mm_use_im_patch_token: Whether the placeholder is `<im_patch>` instead of `<image>`.
        image_aspect_ratio: `square` (stretch) or `pad`.

    Raises:
        ValueError: If a value is not allowed, or the tokenizer cannot express the template.
    """

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        **kwargs: Unpack[MetaMorphProcessingKwargs],
    ) -> BatchFeature:
        """Turn prompts that are already in their template, and their images, into inputs of the model.

        Text that `apply_chat_template` has written gets the ids that it was trained with. Unlike the contents given
        to `encode_conversation`, control tokens in `text` count. The BOS token is added if the tokenizer does so,
        conversations start with it and the text does not.

        Args:
            images: All images in reading order, or a list of images for each prompt. An image is what
                [`metamorph.models.image_inputs.load_image`] takes, or an [`ImagePart`] of an earlier answer.
            text: One prompt or several, with an `<image>` marker for each image.
            **kwargs: As for Transformers' processors, flat or in `text_kwargs` and `images_kwargs`: `padding`,
                `padding_side` (by default the tokenizer's, which the processor sets to `left`), `pad_to_multiple_of`,
                `truncation`, which cuts before the first image that does not fit, `max_length`, `add_special_tokens`,
                `return_attention_mask`, `return_mm_token_type_ids` (1 for placeholders), `return_tensors`,
                `input_data_format` and `allow_urls`. Others are refused.

        Returns:
            `input_ids` and `attention_mask` `[batch, sequence]`; `pixel_values` `[images, 3, height, width]` if there
            are images; `visual_tokens` `[images, num_image_tokens, vision_hidden]` if there are [`ImagePart`]s, and
            `visual_tokens_index`, their positions among all images, if there are both.

        Raises:
            TypeError: If there is no such argument.
            ValueError: If the number of images is not that of the markers, or an argument cannot act.
        """
        options = ProcessorOptions.of(self, kwargs)
        if text is None:
            if images is None:
                raise ValueError("give text, images or both")
            return BatchFeature(self._image_inputs(flatten_images(images), options), tensor_type=options.return_tensors)
        prompts: list[Any] = list(text) if isinstance(text, (list, tuple)) else [text]
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError("text must be a string or a list of strings; images are the first argument, or images=")
        encoded = [self._encoder.encode_text(prompt, options.limit, options.add_special_tokens) for prompt in prompts]
        pictures = divide_images(images, [count for _, count in encoded], "prompt")
        return self._batch([builder for builder, _ in encoded], pictures, options)

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        chat_template: str | None = None,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        return_assistant_tokens_mask: bool = False,
        tokenize: bool = False,
        return_tensors: str | None = "pt",
        return_dict: bool = True,
        images: Any = None,
        processor_kwargs: Mapping[str, Any] | None = None,
        sanitize_control_tokens: bool = True,
        **kwargs: Any,
    ) -> str | list[str] | BatchFeature | Any:
        """Write conversations in the processor's template.

        Args:
            conversation: Messages as in [`encode_conversation`], or a list of such conversations.
            chat_template: A Jinja template for this call, in place of the processor's.
            tools: Refused: the model is not trained to call tools.
            documents: Refused.
            add_generation_prompt: Whether to end with the header of the assistant's next answer.
            continue_final_message: Whether to end with the last message, which the model continues.
            return_assistant_tokens_mask: Whether to return `assistant_masks` `[batch, sequence]`: 1 for what is learnt
                in training, visual tokens included, else 0.
            tokenize: Whether to return model inputs instead of text. The text loses the difference between control
                tokens and literal ones, so tokenize here where contents come from strangers.
            return_tensors: As in `__call__`.
            return_dict: False returns the `input_ids` only.
            images: The images that are not in the messages, in reading order over all conversations, or a list for
                each conversation.
            processor_kwargs: Arguments of `__call__`; they may also be given directly. Rows are padded by default.
            sanitize_control_tokens: Contents never give control tokens where this tokenizes, so only True is allowed.
            **kwargs: What the template reads, as `enable_thinking`.

        Returns:
            Text (a list for a list of conversations), or what `__call__` returns.

        Raises:
            ValueError: As `encode_conversation` and `__call__`; or for what the template does not know.
        """
        if tools or documents:
            raise ValueError("tools and documents are not supported: write them into a message")
        if not sanitize_control_tokens and tokenize:
            raise ValueError("sanitize_control_tokens=False is not supported: use tokenize=False and the processor")
        arguments = {name: kwargs.pop(name) for name in list(kwargs) if is_processor_argument(name)}
        options = {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "variables": kwargs,
        }
        if return_assistant_tokens_mask and kwargs:
            raise ValueError(f"return_assistant_tokens_mask marks the text of training, which has no {min(kwargs)}")
        is_batch = bool(conversation) and not isinstance(conversation[0], Mapping)
        parsed = [parse_messages(messages) for messages in (conversation if is_batch else [conversation])]
        encoder = self._encoder_for(chat_template)
        if not tokenize:
            if return_assistant_tokens_mask:
                raise ValueError("return_assistant_tokens_mask needs tokenize=True")
            texts = [encoder.write(messages, **options) for messages in parsed]
            return texts if is_batch else texts[0]
        arguments = {"padding": True, "return_tensors": return_tensors, **arguments, **(processor_kwargs or {})}
        call = ProcessorOptions.of(self, arguments)
        counts = [sum(message.num_open_images for message in messages) for messages in parsed]
        given = divide_images(images, counts, "conversation")
        pictures = [assign_images(messages, own) for messages, own in zip(parsed, given, strict=True)]
        builders = [encoder.encode(messages, call.limit, **options) for messages in parsed]
        batch = self._batch(builders, pictures, call, assistant_masks=return_assistant_tokens_mask)
        return batch if return_dict else batch["input_ids"]

    def batch_decode(self, sequences: Any, **kwargs: Any) -> list[str]:
        """Text of each row of ids, or of what `generate` returned; with `skip_special_tokens=True` without images."""
        return self.tokenizer.batch_decode(getattr(sequences, "sequences", sequences), **kwargs)

    def decode(self, token_ids: Any, **kwargs: Any) -> Any:
        """Text of one row of ids; of a batch, or of what `generate` returned, as `batch_decode`."""
        return self.tokenizer.decode(getattr(token_ids, "sequences", token_ids), **kwargs)

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **kwargs: Any
    ) -> list[str]:
        """As `batch_decode`, for Transformers' pipelines."""
        return self.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        """What the model may be given of a batch."""
        return [*super().model_input_names, "visual_tokens", "visual_tokens_index"]

    def _get_num_multimodal_tokens(
        self, image_sizes: Sequence[Sequence[int]] | None = None, **kwargs: Any
    ) -> MultiModalData:
        """How many placeholders images have, whatever their sizes; inference engines ask for it."""
        if image_sizes is None:
            return MultiModalData()
        count = len(image_sizes)
        return MultiModalData(num_image_tokens=[self.num_image_tokens] * count, num_image_patches=[1] * count)

    def decode_interleaved(
        self,
        sequences: torch.Tensor | Sequence[Sequence[int]],
        visual_tokens: torch.Tensor | None = None,
        prompt_length: int = 0,
        skip_special_tokens: bool = True,
    ) -> list[list[TextPart | ImagePart]]:
        """Turn generated sequences into texts and images, in the order in which the model wrote them.

        Args:
            sequences: `[batch, sequence]` ids; what follows the first end of turn after the prompt is ignored.
            visual_tokens: `[images, num_image_tokens, vision_hidden]` of the generated images, row by row.
            prompt_length: Number of leading ids of each row to leave out.
            skip_special_tokens: Whether control tokens are left out of the text.

        Raises:
            ValueError: If placeholders and visual tokens disagree in number.
        """
        return interleave(
            [sequence[prompt_length:] for sequence in sequences],
            visual_tokens,
            # Llama-3's tokenizer asks to clean up spaces, but that is for WordPiece.
            partial(self.tokenizer.decode, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False),
            ends=frozenset(self.end_of_turn_token_ids),
            placeholder=self.image_token_id,
            num_image_tokens=self.num_image_tokens,
        )

    def _encoder_for(self, chat_template: str | None) -> ConversationEncoder:
        """The encoder of a template that is given for one call."""
        if chat_template is None or chat_template == self.chat_template:
            return self._encoder
        known = self._encoders.get(chat_template)
        if known is None:
            known = self._encoder_of(get_chat_template("auto", self.tokenizer, chat_template))
            if len(self._encoders) >= _MAX_TEMPLATES:
                self._encoders.clear()
            self._encoders[chat_template] = known
        return known

    def _batch(
        self,
        builders: Sequence[SequenceBuilder],
        pictures: Sequence[Sequence[Any]],
        options: ProcessorOptions,
        assistant_masks: bool = False,
    ) -> BatchFeature:
        """The inputs of a batch: the sequence of each row, cut to the limit, and its images before it was cut."""
        data: dict[str, Any] = {"input_ids": options.pad([row.ids for row in builders], self.pad_token_id)}
        if options.return_attention_mask:
            data["attention_mask"] = options.pad([[1] * len(row.ids) for row in builders], 0)
        if assistant_masks:
            data["assistant_masks"] = options.pad([row.learnt for row in builders], 0)
        if options.return_mm_token_type_ids:
            data["mm_token_type_ids"] = self.create_mm_token_type_ids(data["input_ids"])
        kept = [row[: builder.num_images] for row, builder in zip(pictures, builders, strict=True)]
        if dropped := sum(map(len, pictures)) - sum(map(len, kept)):
            logger.warning("%d image(s) after the cut at %s tokens were dropped", dropped, options.limit)
        data.update(self._image_inputs([image for row in kept for image in row], options))
        return BatchFeature(data, tensor_type=options.return_tensors)


AutoProcessor.register(MetaMorphConfig, MetaMorphProcessor, exist_ok=True)
