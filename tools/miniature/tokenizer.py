"""A tokenizer of Llama-3's kind for a small closed vocabulary.

Like Llama-3's it is a byte-level BPE with `ignore_merges`: a piece of text that is in the vocabulary is one
token, whatever the merges say. Here there are no merges at all, so a known word (with or without the space
before it) is one token, and anything else falls back to its UTF-8 bytes. Encoding is therefore lossless: no
unknown token exists, and `decode(encode(text)) == text` for every text.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


BOS_TOKEN = "<|begin_of_text|>"
END_OF_TEXT_TOKEN = "<|end_of_text|>"
START_HEADER_TOKEN = "<|start_header_id|>"
END_HEADER_TOKEN = "<|end_header_id|>"
EOT_TOKEN = "<|eot_id|>"
PAD_TOKEN = "<|finetune_right_pad_id|>"

SPECIAL_TOKENS = (
    BOS_TOKEN,
    END_OF_TEXT_TOKEN,
    PAD_TOKEN,
    START_HEADER_TOKEN,
    END_HEADER_TOKEN,
    EOT_TOKEN,
)
"""The special tokens of Llama-3 that a chat needs, in the order of their ids (the last ids of the table)."""

ROLES = ("system", "user", "assistant")

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' -}}
    {%- set turn = namespace(text='') -%}
    {%- if message['content'] is string -%}
        {%- set turn.text = message['content'] -%}
    {%- else -%}
        {%- for part in message['content'] -%}
            {%- set turn.text = turn.text + (part['text'] if part['type'] == 'text' else '<image>') -%}
        {%- endfor -%}
    {%- endif -%}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}{{- (turn.text | trim) + '<|eot_id|>' -}}{%- endgeneration -%}
    {%- else -%}
        {{- (turn.text | trim) + '<|eot_id|>' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
"""
"""Llama-3's chat format, with the assistant's words marked for `return_assistant_tokens_mask`."""

# A word with the one space before it; a digit; a run of line ends; or any other single character.
_PIECES = Regex(r" ?\p{L}+|\p{N}|\n+| ?[^\s\p{L}\p{N}]|\s")


def build_tokenizer(words: Iterable[str], model_max_length: int = 512) -> PreTrainedTokenizerFast:
    """Build the tokenizer for a closed vocabulary.

    Args:
        words: The words to know. An entry may hold several words or punctuation: it is cut into pieces as
            text is. Every word gets two tokens, one with a leading space and one without, as in Llama-3.
        model_max_length: Longest sequence of the model that the tokenizer belongs to, in tokens.

    Returns:
        A fast tokenizer whose ids are, in this order: the 256 bytes, two line ends, the words in alphabetical
        order, the special tokens. It begins every sequence with `<|begin_of_text|>` unless told not to, and
        it has no image tokens: these are added as to any other LLM's tokenizer.

    Raises:
        ValueError: There are no words.
    """
    pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_PIECES, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    pieces: set[str] = set()
    for word in [*words, *ROLES]:
        for text in (word, f" {word}"):
            pieces.update(piece for piece, _ in pre_tokenizer.pre_tokenize_str(text))
    if len(pieces) <= 2 * len(ROLES):
        raise ValueError(f"words must name at least one word besides the roles {ROLES}, got none.")

    newline = pre_tokenizer.pre_tokenize_str("\n\n")[0][0]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ordered = [*alphabet, newline, *sorted(pieces - set(alphabet))]
    vocabulary = {piece: index for index, piece in enumerate(ordered)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS_TOKEN} $A",
        pair=f"{BOS_TOKEN} $A {BOS_TOKEN} $B",
        special_tokens=[(BOS_TOKEN, backend.token_to_id(BOS_TOKEN))],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS_TOKEN,
        eos_token=EOT_TOKEN,
        pad_token=PAD_TOKEN,
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
