"""Applies a chat template: conversations to text, and to ids, labels and visual-target mask."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from metamorph.models.sequence.chat_template import ChatTemplate, Segment
from metamorph.models.sequence.constants import DEFAULT_IMAGE_TOKEN
from metamorph.models.sequence.conversations import IMAGE_MARKER, ImageMarker, Message, SequenceBuilder
from metamorph.models.sequence.image_tokens import ImageTokens
from metamorph.models.sequence.text_encoding import TextEncoder


_CUT = "\ue005"  # private-use character after the content of a message to continue


class ConversationEncoder:
    """Writes conversations in a chat template and encodes them. Threads may share it."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: ChatTemplate,
        image_tokens: ImageTokens,
        image_token: str,
        num_image_tokens: int,
    ) -> None:
        self.template = template
        self._tokens = image_tokens
        self._image_token = image_token
        self._num_image_tokens = num_image_tokens
        self._text = TextEncoder(tokenizer, template)
        # As in conversations: a text in the template must have the ids of training.
        self._adds_bos = template.writes_bos and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
        self._bos = tokenizer.bos_token_id

    def write(self, messages: Sequence[Message], **options: Any) -> str:
        """Text of a conversation; options as for `encode`."""
        text = "".join(segment.text for segment in self._segments(messages, **options))
        return self._text.reveal(text).replace(self._image_token, DEFAULT_IMAGE_TOKEN)

    def encode(self, messages: Sequence[Message], limit: int | None = None, **options: Any) -> SequenceBuilder:
        """Ids, labels and visual-target mask of a conversation, cut to `limit` tokens.

        Options are `add_generation_prompt` and `continue_final_message` (end with the header of an answer, or with the
        beginning of one), and `variables` of the template, by name, with which nothing is supervised.
        """
        builder = SequenceBuilder(self._tokens, self._num_image_tokens, limit)
        before = ""
        for segment in self._segments(messages, **options):
            ids, replaced, shared = self._text.encode_after(before, segment.text)
            builder.remove(replaced)
            builder.add(ids[:shared], supervised=False)
            builder.add(ids[shared:], segment.supervised)
            if builder.truncated:
                return builder
            before += segment.text
        num_images = sum(isinstance(part, ImageMarker) for message in messages for part in message.parts)
        if builder.num_images != num_images:
            raise ValueError(
                f"the chat template writes {builder.num_images} of the {num_images} image(s) of a conversation; choose "
                "another --version"
            )
        return builder

    def encode_text(self, text: str, limit: int | None = None, add_bos: bool = True) -> tuple[SequenceBuilder, int]:
        """Ids of a text that is in the template already, in which control tokens count, and its number of images."""
        ids = self._text.encode(self._text.escape(IMAGE_MARKER.sub(self._image_token, text)))
        if add_bos and self._adds_bos and ids[:1] != [self._bos]:
            ids = [self._bos, *ids]
        builder = SequenceBuilder(self._tokens, self._num_image_tokens, limit)
        builder.add(ids, supervised=False)
        return builder, ids.count(self._tokens.image)

    def _segments(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> list[Segment]:
        """Segments with a placeholder for each image, and control tokens hidden in contents."""
        written = [{"role": message.role, "content": self._hidden(message)} for message in messages]
        if continue_final_message:
            if add_generation_prompt or not messages or messages[-1].role != "assistant":
                raise ValueError(
                    "continue_final_message needs the assistant's message at the end, and no add_generation_prompt"
                )
            written[-1]["content"] += _CUT
        segments = self.template.write(
            written, add_generation_prompt=add_generation_prompt, variables=dict(variables or {})
        )
        return list(_before_cut(segments)) if continue_final_message else segments

    def _hidden(self, message: Message) -> str:
        is_answer = message.role == "assistant"
        return "".join(
            self._text.hide(part, is_answer) if isinstance(part, str) else self._image_token for part in message.parts
        )


def _before_cut(segments: Sequence[Segment]) -> Iterable[Segment]:
    length = "".join(segment.text for segment in segments).rfind(_CUT)
    if length < 0:
        raise ValueError("the chat template does not write the content of the last message: it cannot be continued")
    for segment in segments:
        if length:
            yield replace(segment, text=segment.text[:length])
        length -= min(length, len(segment.text))
