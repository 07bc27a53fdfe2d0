"""The processor: prompts or conversations and their images to model inputs, and generated ids to text and images.

One class, as processors of Transformers are, so the file has more than 400 lines.
"""

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from transformers import AutoProcessor, BaseImageProcessor, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from transformers.processing_utils import MultiModalData, Unpack

from metamorph.files.model_files import read_json_object
from metamorph.models.configuration_metamorph import MAX_IMAGE_TOKENS, MetaMorphConfig
from metamorph.models.image_inputs import to_pil_image
from metamorph.models.image_processing import pixel_table, preprocess_images, square_image_processor
from metamorph.models.pretrained import find_file
from metamorph.models.processing_kwargs import MetaMorphProcessingKwargs, ProcessorOptions, is_processor_argument
from metamorph.models.sequence.chat_template import ChatTemplate
from metamorph.models.sequence.chat_templates import get_chat_template
from metamorph.models.sequence.constants import ASPECT_RATIOS, DEFAULT_IM_PATCH_TOKEN, DEFAULT_IMAGE_TOKEN, IGNORE_INDEX
from metamorph.models.sequence.conversation_encoder import ConversationEncoder
from metamorph.models.sequence.conversations import (
    EncodedConversation,
    ImagePart,
    Message,
    SequenceBuilder,
    TextPart,
    assign_images,
    divide_images,
    flatten_images,
    interleave,
    parse_messages,
    stack_visual_tokens,
)
from metamorph.models.sequence.image_tokens import ImageTokens, add_image_tokens


logger = logging.getLogger(__name__)

PROCESSOR_FILE = "processor_config.json"
_AUDIO_FILE = "audio_tokenizer_config.json"
_FILE_FIELDS = {
    *("chat_template", "image_aspect_ratio", "image_processor", "mm_use_im_patch_token", "mm_use_im_start_end"),
    *("num_image_tokens", "processor_class", "version"),
}
"""Allowed fields of `processor_config.json`."""
_MAX_TEMPLATES = 8  # templates of single calls that are cached
_DEFAULT_OPTIONS = ProcessorOptions()


class MetaMorphProcessor(ProcessorMixin):
    """Joins an image processor and a tokenizer, and builds the model's sequences.

    Args:
        image_processor: Image processor of the vision tower (SigLIP, SigLIP 2, CLIP or DINOv2). It is copied, and the
            copy makes exact squares.
        tokenizer: Tokenizer of the language model. The image tokens are added to it if it lacks them.
        chat_template: Jinja template for `version="auto"`; by default the tokenizer's own.
        image_aspect_ratio: `square` (stretch) or `pad`.

    The other options are those of [`MetaMorphConfig`].
    """

    def __init__(
        self,
        image_processor: BaseImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        num_image_tokens: int = 64,
        version: str = "llama3",
        mm_use_im_start_end: bool = True,
        mm_use_im_patch_token: bool = False,
        image_aspect_ratio: str = "square",
    ) -> None:
        if not (isinstance(num_image_tokens, int) and 1 <= num_image_tokens <= MAX_IMAGE_TOKENS):
            raise ValueError(f"--num_image_tokens must be from 1 to {MAX_IMAGE_TOKENS}, not {num_image_tokens!r}")
        if image_aspect_ratio not in ASPECT_RATIOS:
            raise ValueError(
                f"--image_aspect_ratio {image_aspect_ratio!r} is unknown; use one of {', '.join(ASPECT_RATIOS)}"
            )
        super().__init__(square_image_processor(image_processor), tokenizer, chat_template=chat_template)
        self.num_image_tokens = num_image_tokens
        self.version = version
        self.mm_use_im_start_end = mm_use_im_start_end
        self.mm_use_im_patch_token = mm_use_im_patch_token
        self.image_aspect_ratio = image_aspect_ratio
        self.image_tokens: ImageTokens = add_image_tokens(
            tokenizer, mm_use_im_start_end=mm_use_im_start_end, mm_use_im_patch_token=mm_use_im_patch_token
        )
        self.image_token = DEFAULT_IM_PATCH_TOKEN if mm_use_im_patch_token else DEFAULT_IMAGE_TOKEN
        self.image_token_id = self.image_tokens.image
        tokenizer.padding_side = "left"  # for generation, whatever the side that language models are saved with
        self._encoders: dict[str, ConversationEncoder] = {}
        self._encoder = self._make_encoder(version, chat_template)
        self.template: ChatTemplate = self._encoder.template
        # Saved with both: other programs then write the text that the model is trained on.
        self.chat_template = tokenizer.chat_template = self.template.source
        self._pixel_table = pixel_table(self.image_processor)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> "MetaMorphProcessor":
        """Load a processor as in Transformers, but never run, or ask on stdin to run, code that comes with it."""
        if kwargs.pop("trust_remote_code", None):
            raise ValueError("trust_remote_code is not supported: code that comes with a model is never run")
        _check_files(pretrained_model_name_or_path, kwargs)
        processor = super().from_pretrained(pretrained_model_name_or_path, trust_remote_code=False, **kwargs)
        processor.tokenizer.padding_side = kwargs.get("padding_side", processor.tokenizer.padding_side)
        return processor

    @classmethod
    def from_parts(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: BaseImageProcessor,
        config: MetaMorphConfig,
        **overrides: Any,
    ) -> "MetaMorphProcessor":
        """Make the processor that fits a model's configuration, with the size of the vision tower's images.

        `overrides` are arguments of the constructor that `config` does not hold, such as `image_aspect_ratio`.
        """
        names = ("num_image_tokens", "version", "mm_use_im_start_end", "mm_use_im_patch_token")
        squared = square_image_processor(image_processor, config.vision_image_size)
        return cls(squared, tokenizer, **{**{name: getattr(config, name) for name in names}, **overrides})

    def check_fits(self, config: MetaMorphConfig) -> None:
        """Check that a model takes this processor's sequences and pixels."""
        size = self.image_processor.size
        for name, own, needed in (
            ("num_image_tokens", self.num_image_tokens, config.num_image_tokens),
            ("size of images", (size["height"], size["width"]), (config.vision_image_size,) * 2),
        ):
            if own != needed:
                raise ValueError(
                    f"the {name} of {PROCESSOR_FILE} is {own}, but that of config.json {needed}: copy the model again"
                )

    @property
    def pad_token_id(self) -> int:
        """The tokenizer's pad token, else its end of sequence, else 0: any will do, masks are made from lengths."""
        candidates = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(candidate for candidate in candidates if candidate is not None)

    @property
    def end_of_turn_token_ids(self) -> list[int]:
        """Ids that end an answer: the template's ends of turns and the tokenizer's end of sequence."""
        ends = {self.tokenizer.eos_token_id, *self.tokenizer.convert_tokens_to_ids(list(self.template.end_tokens))}
        return sorted(end for end in ends if end is not None)

    @property
    def model_input_names(self) -> list[str]:
        """Names of the model inputs in a batch."""
        return [*super().model_input_names, "visual_tokens", "visual_tokens_index"]

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        **kwargs: Unpack[MetaMorphProcessingKwargs],
    ) -> BatchFeature:
        """Turn prompts that are in their template already, and their images, into model inputs.

        Text written by `apply_chat_template` gets the ids that it has in training. Unlike in contents given to
        `encode_conversation`, control tokens in `text` count. The BOS token is added if the tokenizer does so,
        conversations start with it and the text does not.

        Args:
            images: All images in reading order, or a list of images for each prompt. An image is what
                [`metamorph.models.image_inputs.to_pil_image`] takes, or an [`ImagePart`] of an earlier answer.
            text: One prompt or several, with an `<image>` marker for each image.
            **kwargs: As for Transformers' processors, flat or in `text_kwargs` and `images_kwargs`: `padding`,
                `padding_side` (by default the tokenizer's, which the processor sets to `left`), `pad_to_multiple_of`,
                `truncation`, which cuts before the first image that does not fit, `max_length`, `add_special_tokens`,
                `return_attention_mask`, `return_mm_token_type_ids` (1 for placeholders), `return_tensors`,
                `input_data_format` and `allow_urls`. Others are a `TypeError`, or a `ValueError` if they have no
                effect.

        Returns:
            `input_ids` and `attention_mask` `[batch, sequence]`; `pixel_values` `[images, 3, height, width]` if there
            are images; `visual_tokens` `[images, num_image_tokens, vision_hidden]` if there are [`ImagePart`]s, and
            `visual_tokens_index`, their positions among all images, if there are both.
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
        divided = divide_images(images, [count for _, count in encoded], "prompt")
        return self._batch([builder for builder, _ in encoded], divided, options)

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
        """Write conversations in the processor's template. Arguments of Transformers' processors work, or are refused.

        Args:
            conversation: Messages as in [`encode_conversation`], or a list of such conversations.
            chat_template: A Jinja template for this call instead of the processor's.
            tools: Refused, as are `documents`: the model is not trained for them.
            add_generation_prompt: Whether to end with the header of the assistant's next answer.
            continue_final_message: Whether to end with the last message, for the model to continue.
            return_assistant_tokens_mask: Whether to return `assistant_masks` `[batch, sequence]`: 1 for tokens that are
                learned in training, visual tokens included, else 0.
            tokenize: Whether to return model inputs instead of text. In the text, control tokens and their literal
                names look alike, so tokenize here if contents come from untrusted sources.
            return_dict: False returns only the `input_ids`.
            images: The images that are not in the messages, in reading order over all conversations, or a list for
                each conversation.
            processor_kwargs: Arguments of `__call__`; they may also be given directly. Rows are padded by default.
            sanitize_control_tokens: Only True with `tokenize`: contents never give control tokens.
            **kwargs: Variables of the template, such as `enable_thinking`.

        Returns:
            Text (a list for a list of conversations), or what `__call__` returns.
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
        divided = [assign_images(messages, own) for messages, own in zip(parsed, given, strict=True)]
        builders = [encoder.encode(messages, call.limit, **options) for messages in parsed]
        batch = self._batch(builders, divided, call, assistant_masks=return_assistant_tokens_mask)
        return batch if return_dict else batch["input_ids"]

    def encode_conversation(
        self,
        messages: Sequence[Mapping[str, Any]],
        images: Sequence[Any] | None = None,
        *,
        system: str | None = None,
        add_generation_prompt: bool = False,
        model_max_length: int | None = None,
        with_pixels: bool = True,
    ) -> EncodedConversation:
        """Encode one conversation for training: ids, labels, visual-target mask and pixels, built together.

        Every token of an assistant turn is supervised, including its end of turn and the `<image_start>` and
        `<image_end>` of its images, but not placeholders. Contents are stripped and never give control tokens: a
        literal `<|eot_id|>` in them is spelt as text. The ids are those of the full text: a token that begins in the
        prompt and ends in the answer, as `:**` may, is not supervised, because in use the prompt ends within it.

        Args:
            messages: `{"role": "system" | "user" | "assistant", "content": ...}`. A content is a string with
                one `<image>` for each image, or a list of `{"type": "text", "text": ...}` and
                `{"type": "image", "image": ...}` parts (without `"image"`, the next of `images` is used).
            images: The images of all `<image>` markers, in reading order.
            system: A system message to begin with, if `messages` has none.
            add_generation_prompt: Whether to end with the header of the assistant's next answer.
            model_max_length: Longest sequence. A longer one is cut between tokens of text, or before the first
                image that does not fit; images after the cut are dropped.
            with_pixels: False leaves `pixel_values` out, for images that are encoded already: `images` may hold
                anything then.
        """
        parsed = parse_messages(messages)
        if system is not None and not any(message.role == "system" for message in parsed):
            parsed.insert(0, Message("system", [system.strip()]))
        images = assign_images(parsed, images)
        builder = self._encoder.encode(parsed, model_max_length, add_generation_prompt=add_generation_prompt)
        return EncodedConversation(
            input_ids=torch.tensor(builder.ids, dtype=torch.long),
            labels=torch.tensor(builder.labels, dtype=torch.long),
            visual_target_mask=torch.tensor(builder.targets, dtype=torch.bool),
            num_dropped_images=len(images) - builder.num_images,
            truncated=builder.truncated,
            **(self._image_inputs(images[: builder.num_images]) if with_pixels else {}),
        )

    def measure_conversation(self, messages: Sequence[Mapping[str, Any]]) -> tuple[int, int, int, int]:
        """Count what `encode_conversation` would make of a conversation without a limit.

        Returns the number of tokens, including those of images; of images; of images in answers; of tokens with text
        loss.
        """
        builder = self._encoder.encode(parse_messages(messages))
        answer_images = sum(builder.targets) // self.num_image_tokens
        text_targets = len(builder.labels) - builder.labels.count(IGNORE_INDEX)
        return len(builder.ids), builder.num_images, answer_images, text_targets

    def batch_decode(self, sequences: Any, **kwargs: Any) -> list[str]:
        """Decode rows of ids, or the output of `generate`; `skip_special_tokens=True` leaves images out."""
        return self.tokenizer.batch_decode(getattr(sequences, "sequences", sequences), **kwargs)

    def decode(self, token_ids: Any, **kwargs: Any) -> Any:
        """Decode one row of ids; a batch, or the output of `generate`, as `batch_decode`."""
        return self.tokenizer.decode(getattr(token_ids, "sequences", token_ids), **kwargs)

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **kwargs: Any
    ) -> list[str]:
        """As `batch_decode`, for Transformers' pipelines."""
        return self.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)

    def post_process_multimodal_output(
        self,
        generated_outputs: Any,
        skip_special_tokens: bool = True,
        generation_mode: str | None = None,
        **kwargs: Any,
    ) -> list[Any]:
        """The texts of `generate`'s output, or with `image` the images that `decode_image_tokens` drew."""
        if generation_mode == "image":
            return generated_outputs
        if generation_mode not in (None, "text"):
            raise ValueError(f"generation_mode {generation_mode!r} is not one of image, text")
        return self.post_process_image_text_to_text(generated_outputs, skip_special_tokens, **kwargs)

    def decode_interleaved(
        self,
        sequences: torch.Tensor | Sequence[Sequence[int]],
        visual_tokens: torch.Tensor | None = None,
        prompt_length: int = 0,
        skip_special_tokens: bool = True,
    ) -> list[list[TextPart | ImagePart]]:
        """Decode generated sequences to texts and images, in the order in which the model wrote them.

        `sequences` are `[batch, sequence]` ids, of which the first `prompt_length` and what follows the first end of
        turn after them are ignored; `visual_tokens` `[images, num_image_tokens, vision_hidden]` are those of the
        generated images, row by row.
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

    def _get_num_multimodal_tokens(
        self, image_sizes: Sequence[Sequence[int]] | None = None, **kwargs: Any
    ) -> MultiModalData:
        """Placeholders of images, whatever their sizes; inference engines call this."""
        if image_sizes is None:
            return MultiModalData()
        count = len(image_sizes)
        return MultiModalData(num_image_tokens=[self.num_image_tokens] * count, num_image_patches=[1] * count)

    def _make_encoder(self, version: str, chat_template: str | None) -> ConversationEncoder:
        template = get_chat_template(version, self.tokenizer, chat_template)
        return ConversationEncoder(self.tokenizer, template, self.image_tokens, self.image_token, self.num_image_tokens)

    def _encoder_for(self, chat_template: str | None) -> ConversationEncoder:
        """The encoder of a template that is given for one call."""
        if chat_template is None or chat_template == self.chat_template:
            return self._encoder
        encoder = self._encoders.get(chat_template)
        if encoder is None:
            encoder = self._make_encoder("auto", chat_template)
            if len(self._encoders) >= _MAX_TEMPLATES:
                self._encoders.clear()
            self._encoders[chat_template] = encoder
        return encoder

    def _batch(
        self,
        builders: Sequence[SequenceBuilder],
        images: Sequence[Sequence[Any]],
        options: ProcessorOptions,
        assistant_masks: bool = False,
    ) -> BatchFeature:
        """Model inputs of rows that are cut to the limit already; `images` are those of each row before the cut."""
        data: dict[str, Any] = {"input_ids": options.pad([row.ids for row in builders], self.pad_token_id)}
        if options.return_attention_mask:
            data["attention_mask"] = options.pad([[1] * len(row.ids) for row in builders], 0)
        if assistant_masks:
            data["assistant_masks"] = options.pad([row.learned for row in builders], 0)
        if options.return_mm_token_type_ids:
            data["mm_token_type_ids"] = self.create_mm_token_type_ids(data["input_ids"])
        remaining = [
            image for row, builder in zip(images, builders, strict=True) for image in row[: builder.num_images]
        ]
        if dropped := sum(map(len, images)) - len(remaining):
            logger.warning("%d image(s) after the cut at %s tokens were dropped", dropped, options.limit)
        return BatchFeature({**data, **self._image_inputs(remaining, options)}, tensor_type=options.return_tensors)

    def _image_inputs(self, images: Sequence[Any], options: ProcessorOptions = _DEFAULT_OPTIONS) -> dict[str, Any]:
        """Pixels of images, and visual tokens of those that the model generated."""
        generated = [index for index, image in enumerate(images) if isinstance(image, ImagePart)]
        loaded = [
            to_pil_image(image, allow_urls=options.allow_urls, input_data_format=options.input_data_format)
            for image in images
            if not isinstance(image, ImagePart)
        ]
        data: dict[str, Any] = {}
        if loaded:
            data["pixel_values"] = preprocess_images(
                loaded, self.image_processor, self.image_aspect_ratio, self._pixel_table
            )
        if generated:
            data["visual_tokens"] = stack_visual_tokens([images[index] for index in generated], self.num_image_tokens)
        if loaded and generated:
            data["visual_tokens_index"] = torch.tensor(generated)
        return data


def _check_files(name_or_path: Any, kwargs: Mapping[str, Any]) -> None:
    """Refuse files that make Transformers load more than a tokenizer and an image processor: any model, unchecked."""
    if find_file(name_or_path, _AUDIO_FILE, **kwargs) is not None:
        raise ValueError(f"{name_or_path} holds {_AUDIO_FILE}, which names a model to load: remove it")
    file = find_file(name_or_path, PROCESSOR_FILE, **kwargs)
    unknown = set() if file is None else read_json_object(file).keys() - _FILE_FIELDS
    if unknown:
        raise ValueError(f"{file}: {min(unknown)} is not a field of a MetaMorphProcessor: remove it")


AutoProcessor.register(MetaMorphConfig, MetaMorphProcessor, exist_ok=True)
