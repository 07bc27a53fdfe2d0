"""The processor: from conversations and pictures to ids, labels, visual targets and pixels, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from transformers import AutoProcessor, BaseImageProcessor, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from metamorph.files.model_files import read_json_object
from metamorph.models.configuration_metamorph import MAX_IMAGE_TOKENS, MetaMorphConfig
from metamorph.models.image_processing import (
    flatten_images,
    pixel_table,
    preprocess_images,
    square_image_processor,
)
from metamorph.models.pretrained import find_file
from metamorph.models.sequence.chat_templates import ChatTemplate, Segment, get_chat_template
from metamorph.models.sequence.constants import ASPECT_RATIOS, DEFAULT_IM_PATCH_TOKEN, DEFAULT_IMAGE_TOKEN, IGNORE_INDEX
from metamorph.models.sequence.conversations import (
    EncodedConversation,
    ImageMarker,
    ImagePart,
    Message,
    SequenceBuilder,
    TextPart,
    assign_images,
    check_image_count,
    pad_rows,
    parse_messages,
    split_generated,
    with_placeholders,
)
from metamorph.models.sequence.image_tokens import ImageTokens, add_image_tokens
from metamorph.models.sequence.text_encoding import TextEncoder


_CONFIG_FILE = "processor_config.json"
_AUDIO_FILE = "audio_tokenizer_config.json"
_CONFIG_FIELDS = (
    "chat_template",
    "image_aspect_ratio",
    "image_processor",
    "mm_use_im_patch_token",
    "mm_use_im_start_end",
    "num_image_tokens",
    "processor_class",
    "version",
)
"""What `processor_config.json` may hold."""


class MetaMorphProcessor(ProcessorMixin):
    """Joins an image processor and a tokenizer, and builds the model's sequences.

    Args:
        image_processor: Image processor of the vision tower (SigLIP, SigLIP 2, CLIP or DINOv2). A copy is kept
            that makes exact squares.
        tokenizer: Tokenizer of the language model. The image tokens are added to it if it lacks them.
        chat_template: Jinja template for `version="auto"`; by default the tokenizer's own.
        num_image_tokens: Number of placeholders for each image.
        version: Name of the conversation template, see `metamorph.models.sequence.chat_templates.VERSIONS`.
        mm_use_im_start_end: Whether images stand between `<image_start>` and `<image_end>`.
        mm_use_im_patch_token: Whether the placeholder is `<im_patch>` instead of `<image>`.
        image_aspect_ratio: `square` (stretch) or `pad`.

    Raises:
        ValueError: If a value is not allowed, or the tokenizer cannot express the template.
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
        self.template: ChatTemplate = get_chat_template(version, tokenizer, chat_template)
        # Both are saved: other programs write what the model is trained on.
        self.chat_template = tokenizer.chat_template = self.template.source
        self._encoder = TextEncoder(tokenizer, self.template)
        self._placeholder = DEFAULT_IM_PATCH_TOKEN if mm_use_im_patch_token else DEFAULT_IMAGE_TOKEN
        # As in conversations, so that a text in the template has the ids that were trained.
        self._adds_bos = self.template.writes_bos and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
        self._pixel_table = pixel_table(self.image_processor)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> MetaMorphProcessor:
        """As in Transformers, but code that comes with a tokenizer is never run, and nobody is asked whether it may.

        Args:
            pretrained_model_name_or_path: Folder or Hub id.
            **kwargs: As in Transformers, without `trust_remote_code`.

        Raises:
            ValueError: If the processor has parts or settings that are not ours.
        """
        if kwargs.pop("trust_remote_code", None):
            raise ValueError("trust_remote_code is not supported: code that comes with a model is never run")
        _check_fields(pretrained_model_name_or_path, kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, trust_remote_code=False, **kwargs)

    @classmethod
    def from_parts(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: BaseImageProcessor,
        config: MetaMorphConfig,
        **overrides: Any,
    ) -> MetaMorphProcessor:
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
                    f"the {name} of {_CONFIG_FILE} is {own}, but that of config.json {needed}: copy the model again"
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
        builder = self._build(parsed, model_max_length, add_generation_prompt)
        kept = pictures[: builder.num_images]
        return EncodedConversation(
            input_ids=torch.tensor(builder.ids, dtype=torch.long),
            labels=torch.tensor(builder.labels, dtype=torch.long),
            visual_target_mask=torch.tensor(builder.targets, dtype=torch.bool),
            pixel_values=self._pixel_values(kept) if with_pixels else None,
            num_dropped_images=len(pictures) - len(kept),
            truncated=builder.truncated,
        )

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
        builder = self._build(parse_messages(messages), None, add_generation_prompt=False)
        answer_images = sum(builder.targets) // self.num_image_tokens
        text_targets = len(builder.labels) - builder.labels.count(IGNORE_INDEX)
        return len(builder.ids), builder.num_images, answer_images, text_targets

    def __call__(
        self,
        images: Image.Image | Sequence[Any] | None = None,
        text: str | Sequence[str] | None = None,
        padding: bool | str = False,
        padding_side: str = "left",
        max_length: int | None = None,
        return_tensors: str | None = None,
    ) -> BatchFeature:
        """Turn prompts that are already in their template, and their images, into inputs of the model.

        Text that `apply_chat_template` has written gets the ids that it was trained with. Unlike the contents given
        to `encode_conversation`, control tokens in `text` count. The BOS token is added if the tokenizer does so,
        conversations start with it and the text does not.

        Args:
            images: All images in reading order; nested lists (one for each prompt) are allowed.
            text: One prompt or several, with an `<image>` marker for each image.
            padding: True or `"longest"`, `"max_length"` (needs `max_length`), or False.
            padding_side: `left` for generation, `right` for training.
            max_length: Length to pad to with `padding="max_length"`.
            return_tensors: `"pt"` or None (lists).

        Returns:
            `input_ids` and `attention_mask` `[batch, sequence]`, and `pixel_values` `[images, 3, height, width]`
            if there are images.

        Raises:
            ValueError: If the number of images is not that of the markers.
        """
        pictures = flatten_images(images)
        rows: list[list[int]] = []
        num_markers = 0
        for prompt in [text] if isinstance(text, str) else list(text or []):
            builder = SequenceBuilder(self.image_tokens, self.num_image_tokens, None)
            text_with_placeholders = with_placeholders(prompt, self._placeholder)
            builder.add(self._encoder.encode(self._encoder.escape(text_with_placeholders)), supervised=False)
            bos = self.tokenizer.bos_token_id
            rows.append([bos, *builder.ids] if self._adds_bos and builder.ids[:1] != [bos] else builder.ids)
            num_markers += builder.num_images
        if text is not None:
            check_image_count(num_markers, len(pictures))
        data = pad_rows(rows, self.pad_token_id, padding, padding_side, max_length) if text is not None else {}
        pixel_values = self._pixel_values(pictures)
        if pixel_values is not None:
            data["pixel_values"] = pixel_values
        return BatchFeature(data, tensor_type=return_tensors)

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        images: Sequence[Any] | None = None,
        padding: bool | str = True,
        padding_side: str = "left",
        max_length: int | None = None,
        return_tensors: str | None = "pt",
        return_dict: bool = True,
    ) -> str | list[str] | BatchFeature | Any:
        """Write conversations in the processor's template.

        Args:
            conversation: Messages as in [`encode_conversation`], or a list of such conversations.
            add_generation_prompt: Whether to end with the header of the assistant's next answer.
            tokenize: Whether to return model inputs instead of text. The text loses the difference between control
                tokens and literal ones, so tokenize here where contents come from strangers.
            images: The images that are not in the messages, in reading order over all conversations.
            padding: As in `__call__`.
            padding_side: As in `__call__`.
            max_length: As in `__call__`.
            return_tensors: As in `__call__`.
            return_dict: False returns the `input_ids` only.

        Returns:
            Text (a list for a list of conversations), or what `__call__` returns.
        """
        is_batch = bool(conversation) and not isinstance(conversation[0], Mapping)
        conversations = list(conversation) if is_batch else [conversation]
        if not tokenize:
            texts = [self._render(messages, add_generation_prompt) for messages in conversations]
            return texts if is_batch else texts[0]
        remaining = flatten_images(images)
        encoded = []
        for messages in conversations:
            own = sum(message.num_open_images for message in parse_messages(messages))
            encoded.append(
                self.encode_conversation(messages, remaining[:own], add_generation_prompt=add_generation_prompt)
            )
            remaining = remaining[own:]
        if remaining:
            raise ValueError(f"{len(remaining)} image(s) more than {DEFAULT_IMAGE_TOKEN} markers were given")
        rows = [row.input_ids.tolist() for row in encoded]
        data = pad_rows(rows, self.pad_token_id, padding, padding_side, max_length)
        if not return_dict:
            return BatchFeature(data, tensor_type=return_tensors)["input_ids"]
        pixels = [row.pixel_values for row in encoded if row.pixel_values is not None]
        if pixels:
            data["pixel_values"] = torch.cat(pixels)
        return BatchFeature(data, tensor_type=return_tensors)

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
        features = [] if visual_tokens is None else list(visual_tokens)
        ends = frozenset(self.end_of_turn_token_ids)
        rows: list[list[TextPart | ImagePart]] = []
        used = 0
        for sequence in sequences:
            ids = sequence.tolist() if isinstance(sequence, torch.Tensor) else list(sequence)
            parts: list[TextPart | ImagePart] = []
            for run in split_generated(ids[prompt_length:], self.image_tokens.image, self.num_image_tokens, ends):
                if run is None:
                    if used < len(features):
                        parts.append(ImagePart(features[used]))
                    used += 1
                elif text := self.tokenizer.decode(
                    run,
                    skip_special_tokens=skip_special_tokens,
                    clean_up_tokenization_spaces=False,  # Llama-3's tokenizer asks for it, but it is for WordPiece
                ):
                    parts.append(TextPart(text))
            rows.append(parts)
        if used != len(features):
            raise ValueError(
                f"the sequences hold {used} generated image(s) of {self.num_image_tokens} placeholders, but "
                f"visual_tokens has {len(features)}; is prompt_length={prompt_length} the length of the prompt?"
            )
        return rows

    def _render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        text = "".join(segment.text for segment in self._write(parse_messages(messages), add_generation_prompt))
        return self._encoder.reveal(text).replace(self._placeholder, DEFAULT_IMAGE_TOKEN)

    def _write(self, parsed: Sequence[Message], add_generation_prompt: bool) -> list[Segment]:
        """The text of a conversation with a placeholder for each image, and control tokens hidden in contents."""
        messages = []
        for message in parsed:
            is_answer = message.role == "assistant"
            parts = (
                self._encoder.hide(part, is_answer) if isinstance(part, str) else self._placeholder
                for part in message.parts
            )
            messages.append({"role": message.role, "content": "".join(parts)})
        return self.template.write(messages, add_generation_prompt=add_generation_prompt)

    def _build(self, parsed: list[Message], limit: int | None, add_generation_prompt: bool) -> SequenceBuilder:
        """Ids, labels and visual-target mask of a conversation, up to `limit` tokens."""
        builder = SequenceBuilder(self.image_tokens, self.num_image_tokens, limit)
        before = ""
        for segment in self._write(parsed, add_generation_prompt):
            encoded = self._encoder.encode_after(before, segment.text)
            builder.remove(encoded.replaced)
            builder.add(encoded.ids[: encoded.shared], supervised=False)
            builder.add(encoded.ids[encoded.shared :], segment.supervised)
            if builder.truncated:
                return builder
            before += segment.text
        num_images = sum(isinstance(part, ImageMarker) for message in parsed for part in message.parts)
        if builder.num_images != num_images:
            raise ValueError(
                f"the chat template writes {builder.num_images} of the {num_images} image(s) of a conversation; choose "
                "another --version"
            )
        return builder

    def _pixel_values(self, images: Sequence[Image.Image]) -> torch.Tensor | None:
        if not images:
            return None
        return preprocess_images(images, self.image_processor, self.image_aspect_ratio, self._pixel_table)


def _check_fields(name_or_path: Any, kwargs: Mapping[str, Any]) -> None:
    """Refuse what makes Transformers load more than a tokenizer and an image processor: any model, unchecked."""
    if find_file(name_or_path, _AUDIO_FILE, **kwargs) is not None:
        raise ValueError(f"{name_or_path} holds {_AUDIO_FILE}, which names a model to load: remove it")
    file = find_file(name_or_path, _CONFIG_FILE, **kwargs)
    unknown = set() if file is None else read_json_object(file).keys() - set(_CONFIG_FIELDS)
    if unknown:
        raise ValueError(f"{file}: {min(unknown)} is no field of a {MetaMorphProcessor.__name__}: remove it")


AutoProcessor.register(MetaMorphConfig, MetaMorphProcessor, exist_ok=True)
