"""The conversation templates of `--version`: ours, and the tokenizer's own."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from metamorph.models.sequence.chat_template import ChatTemplate
from metamorph.models.sequence.constants import DEFAULT_IMAGE_TOKEN, VERSIONS
from metamorph.models.sequence.template_date import name_of


_CONTENT = (
    "{% macro text_of(content) %}{% if content is string %}{{ content | trim }}{% else %}"
    "{% set all = namespace(text='') %}{% for part in content %}"
    f"{{% set all.text = all.text + (part['text'] if part['type'] == 'text' else '{DEFAULT_IMAGE_TOKEN}') %}}"
    "{% endfor %}{{ all.text | trim }}{% endif %}{% endmacro %}"
)
"""A content is a string with image markers, or a list of parts as in multimodal chats."""

_HEADERS = (
    "%(bos)s{%% for message in messages %%}"
    "{{ '%(start)s' + message['role'] + '%(after_role)s' + text_of(message['content']) + '%(end)s' }}{%% endfor %%}"
    "{%% if add_generation_prompt %%}{{ '%(start)sassistant%(after_role)s' }}{%% endif %%}"
)
"""Each turn has a header with its role, and a token at its end."""

_PLAIN = (
    "%(bos)s{%% for message in messages %%}{{ text_of(message['content']) }}"
    "{%% if message['role'] == 'assistant' %%}{{ eos_token }}{%% endif %%}{{ '\\n' }}{%% endfor %%}"
)
"""No roles: one turn per line. For caption data in stage 1, where the prompt is only an image."""


def get_chat_template(
    version: str, tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None
) -> ChatTemplate:
    """Build the conversation template that `--version` names.

    The tokenizer decides whether conversations start with a BOS token, and must have the format's control tokens.
    `chat_template` is a Jinja template to use with `version="auto"` instead of the tokenizer's own.
    """
    controls: tuple[str, ...] = ()
    if version in ("llama3", "llama3_original"):
        controls = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
        newlines = r"\n\n" if version == "llama3" else r"\n"
        fields = {"start": controls[0], "after_role": controls[1] + newlines, "end": controls[2]}
        return _named(version, tokenizer, controls, _HEADERS % {"bos": "{{ bos_token }}", **fields})
    if version == "chatml":
        controls = ("<|im_start|>", "<|im_end|>")
        fields = {"start": controls[0], "after_role": r"\n", "end": controls[1] + r"\n"}
        return _named(version, tokenizer, controls, _HEADERS % {"bos": _automatic_bos(tokenizer), **fields})
    if version == "plain":
        if tokenizer.eos_token is None:
            raise ValueError(
                f"--version plain ends an answer with the end-of-sequence token, but {name_of(tokenizer)} has none; "
                "set eos_token in its tokenizer_config.json"
            )
        return _named(version, tokenizer, controls, _PLAIN % {"bos": _automatic_bos(tokenizer)})
    if version == "auto":
        if chat_template is None and tokenizer.chat_template is None:
            raise ValueError(
                f"--version auto uses the tokenizer's own chat template, but {name_of(tokenizer)} has none; choose "
                f"one of {', '.join(VERSIONS[:-1])} with --version, or put a chat_template.jinja into its folder"
            )
        return ChatTemplate(tokenizer, tokenizer.get_chat_template(chat_template))
    raise ValueError(f"--version {version!r} is unknown; use one of {', '.join(VERSIONS)}")


def _named(version: str, tokenizer: PreTrainedTokenizerBase, controls: Sequence[str], source: str) -> ChatTemplate:
    """One of our own templates, if the tokenizer has the tokens it writes."""
    ids = {token: tokenizer.encode(token, add_special_tokens=False) for token in controls}
    missing = [token for token in controls if len(ids[token]) != 1 or ids[token][0] == tokenizer.unk_token_id]
    if missing:
        raise ValueError(
            f"--version {version} needs the tokens {', '.join(missing)}, which {name_of(tokenizer)} does not have; use "
            "--version auto (the tokenizer's own chat template) or plain"
        )
    return ChatTemplate(tokenizer, _CONTENT + source, reads_contents=False, controls=controls)


def _automatic_bos(tokenizer: PreTrainedTokenizerBase) -> str:
    """The BOS token if the tokenizer starts sequences with it (ChatML tokenizers mostly do not)."""
    if tokenizer.bos_token is None or tokenizer("").input_ids[:1] != [tokenizer.bos_token_id]:
        return ""
    return "{{ bos_token }}"
