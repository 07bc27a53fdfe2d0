"""Conversations and pictures to ids, labels, visual targets and pixels, as training needs them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import BaseImageProcessor, PreTrainedTokenizerBase, ProcessorMixin

from metamorph.models.configuration_metamorph import MAX_IMAGE_TOKENS, MetaMorphConfig
from metamorph.models.image_inputs import load_image
from metamorph.models.image_processing import pixel_table, preprocess_images, square_image_processor
from metamorph.models.processing_files import PROCESSOR_FILE, check_processor_files
from metamorph.models.processing_kwargs import ProcessorOptions
from metamorph.models.sequence.answers import stack_visual_tokens
from metamorph.models.sequence.chat_template import ChatTemplate
from metamorph.models.sequence.chat_templates import get_chat_template
from metamorph.models.sequence.constants import ASPECT_RATIOS, DEFAULT_IM_PATCH_TOKEN, DEFAULT_IMAGE_TOKEN, IGNORE_INDEX
from metamorph.models.sequence.conversation_encoder import ConversationEncoder
from metamorph.models.sequence.conversations import (
    EncodedConversation,
    ImagePart,
    Message,
    assign_images,
    parse_messages,
)
from metamorph.models.sequence.image_tokens import ImageTokens, add_image_tokens


if TYPE_CHECKING:
    from typing_extensions import Self

_DEFAULT_OPTIONS = ProcessorOptions()


class ConversationProcessor(ProcessorMixin):
    """An image processor and a tokenizer, and how they build the model's sequences: see [`MetaMorphProcessor`]."""

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
        self._encoder = self._encoder_of(get_chat_template(version, tokenizer, chat_template))
        self.template: ChatTemplate = self._encoder.template
        # Both are saved: other programs write what the model is trained on.
        self.chat_template = tokenizer.chat_template = self.template.source
        self._pixel_table = pixel_table(self.image_processor)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Self:
        """As in Transformers, but code that comes with a tokenizer is never run, and nobody is asked whether it may.

        Args:
            pretrained_model_name_or_path: Folder or Hub id.
            **kwargs: As in Transformers, without `trust_remote_code`.

        Raises:
            ValueError: If the processor has parts or settings that are not ours.
        """
        if kwargs.pop("trust_remote_code", None):
            raise ValueError("trust_remote_code is not supported: code that comes with a model is never run")
        check_processor_files(pretrained_model_name_or_path, kwargs)
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
    ) -> Self:
        """Make the processor that fits a model's configuration.

        Args:
            tokenizer: Tokenizer of the language model; image tokens that it lacks are added.
            image_processor: Image processor of the vision tower; its size is set to the tower's.
            config: Configuration of the model.
            overrides: Arguments of the constructor that `config` does not hold, as `image_aspect_ratio`.
        """
        fields = {
            "num_image_tokens": config.num_image_tokens,
            "version": config.version,
            "mm_use_im_start_end": config.mm_use_im_start_end,
            "mm_use_im_patch_token": config.mm_use_im_patch_token,
        }
        squared = square_image_processor(image_processor, config.vision_image_size)
        return cls(squared, tokenizer, **{**fields, **overrides})

    def check_fits(self, config: MetaMorphConfig) -> None:
        """Check that the sequences and pixels are those that a model takes.

        Args:
            config: Configuration of the model.

        Raises:
            ValueError: If the number of visual tokens or the size of images differs.
        """
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
        """Id to pad with.

        Padding is told from text by the attention mask and never by its id, so a tokenizer without a pad token
        is padded with its end-of-sequence token, or with id 0.
        """
        for candidate in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if candidate is not None:
                return candidate
        return 0

    @property
    def end_of_turn_token_ids(self) -> list[int]:
        """Ids that end an answer: the template's ends of turns and the tokenizer's end of sequence."""
        ends = {self.tokenizer.eos_token_id, *self.tokenizer.convert_tokens_to_ids(list(self.template.end_tokens))}
        return sorted(end for end in ends if end is not None)

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
        """Turn one conversation into ids, labels, visual-target mask and pixels, built together.

        Every token of an assistant turn is supervised, its end of turn and the `<image_start>` and `<image_end>`
        of its images included; placeholders never are. Contents are stripped and never give control tokens: a
        literal `<|eot_id|>` in them is spelt as text. The ids are those of the whole text: a token that begins in the
        prompt and ends in the answer, as `:**` may, is not supervised, because in use the prompt has its beginning.

        Args:
            messages: `{"role": "system" | "user" | "assistant", "content": ...}`. A content is a string with
                one `<image>` for each image, or a list of `{"type": "text", "text": ...}` and
                `{"type": "image", "image": ...}` parts (without `"image"`, the next of `images` is meant).
            images: The images of all `<image>` markers, in reading order.
            system: A system message to begin with, if `messages` has none.
            add_generation_prompt: Whether to end with the header of the assistant's next answer.
            model_max_length: Longest sequence. A longer one is cut between tokens of text, or before the first
                image that does not fit; images after the cut are dropped.
            with_pixels: False leaves `pixel_values` out, for images that are encoded already: then anything may stand
                for an image in `images`.

        Raises:
            ValueError: If the numbers of markers and images differ, or a role or part is unknown.
        """
        parsed = parse_messages(messages)
        if system is not None and not any(message.role == "system" for message in parsed):
            parsed.insert(0, Message("system", [system.strip()]))
        pictures = assign_images(parsed, images)
        builder = self._encoder.encode(parsed, model_max_length, add_generation_prompt=add_generation_prompt)
        kept = pictures[: builder.num_images]
        encoded = EncodedConversation(
            input_ids=torch.tensor(builder.ids, dtype=torch.long),
            labels=torch.tensor(builder.labels, dtype=torch.long),
            visual_target_mask=torch.tensor(builder.targets, dtype=torch.bool),
            pixel_values=None,
            num_dropped_images=len(pictures) - len(kept),
            truncated=builder.truncated,
        )
        return replace(encoded, **self._image_inputs(kept)) if with_pixels else encoded

    def measure_conversation(self, messages: Sequence[Mapping[str, Any]]) -> tuple[int, int, int, int]:
        """Say how long `encode_conversation` would make a conversation without a limit, without its pictures.

        Args:
            messages: As for `encode_conversation`.

        Returns:
            The number of tokens, those of images included; the number of images; how many of them are in answers; the
            number of tokens with text loss.

        Raises:
            ValueError: If a role or part is unknown, or the template cannot express the order of roles.
        """
        builder = self._encoder.encode(parse_messages(messages))
        answer_images = sum(builder.targets) // self.num_image_tokens
        text_targets = len(builder.labels) - builder.labels.count(IGNORE_INDEX)
        return len(builder.ids), builder.num_images, answer_images, text_targets

    def _encoder_of(self, template: ChatTemplate) -> ConversationEncoder:
        return ConversationEncoder(self.tokenizer, template, self.image_tokens, self.image_token, self.num_image_tokens)

    def _image_inputs(self, images: Sequence[Any], options: ProcessorOptions = _DEFAULT_OPTIONS) -> dict[str, Any]:
        """Pixels of pictures, and the visual tokens of images that the model wrote."""
        written = [place for place, image in enumerate(images) if isinstance(image, ImagePart)]
        pictures = [
            load_image(image, allow_urls=options.allow_urls, input_data_format=options.input_data_format)
            for image in images
            if not isinstance(image, ImagePart)
        ]
        data: dict[str, Any] = {}
        if pictures:
            data["pixel_values"] = preprocess_images(
                pictures, self.image_processor, self.image_aspect_ratio, self._pixel_table
            )
        if written:
            data["visual_tokens"] = stack_visual_tokens([images[place] for place in written], self.num_image_tokens)
        if pictures and written:
            data["visual_tokens_index"] = torch.tensor(written)
        return data
